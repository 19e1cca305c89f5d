"""JSON lists of any length, read item by item."""

import json
import os
import re
from collections.abc import Iterator
from functools import partial

CHUNK = 1 << 20  # characters read at a time
LONGEST = 64 * CHUNK  # an item that goes on for longer is a broken file
BLANK = ' \t\n\r'
OPENING, CLOSING = re.compile(rf'\[[{BLANK}]*'), re.compile(r'\]')
NEXT = re.compile(rf'[{BLANK}]*([,\]])[{BLANK}]*')


def read_json_list(path: str | os.PathLike, chunk: int = CHUNK) -> Iterator:
    """The items of a JSON list, in the memory of a chunk and the longest item.

    Raises:
        ValueError: the file is no JSON list or breaks off; what came before has been yielded.
    """
    decode = json.JSONDecoder().raw_decode
    text, count, opened, closed, problem = '', 0, False, False, 'not a JSON list'
    with open(path, encoding='utf-8') as file:
        for piece in iter(partial(file.read, chunk), ''):
            text, at = (text + piece).lstrip(BLANK), 0
            if not opened and (mark := OPENING.match(text)):
                opened, at = True, mark.end()
            if opened and not count and not closed and (mark := CLOSING.match(text, at)):
                closed, at = True, mark.end()
            while opened and not closed:
                try:
                    item, end = decode(text, at)
                except json.JSONDecodeError as error:
                    problem = error.msg
                    break  # the item's end may be in the next piece
                if not (mark := NEXT.match(text, end)):
                    break  # so may the rest of a number
                yield item
                at, count, closed = mark.end(), count + 1, mark[1] == ']'
            text = text[at:]
            if len(text) > LONGEST:
                break
    if not closed or text.strip(BLANK):
        raise ValueError(f'{path} breaks off after {count} items: {problem}')
