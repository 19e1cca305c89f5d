"""JSON lists of any length, read item by item."""

import json
import os
import re
from collections.abc import Iterator
from functools import partial

from data.tables import encoding_of, read_text

CHUNK = 1 << 20  # characters read at a time
LONGEST = 64 * CHUNK  # an item that goes on for longer is a broken file
BLANK = ' \t\n\r'
OPENING, CLOSING = re.compile(rf'\[[{BLANK}]*'), re.compile(r'\]')
NEXT = re.compile(rf'[{BLANK}]*([,\]])[{BLANK}]*')


def read_json_list(path: str | os.PathLike, chunk: int = CHUNK) -> Iterator[tuple[int, object]]:
    """(line that it starts in, item) of a JSON list, in the memory of a chunk and the longest item.

    Raises:
        ValueError: the file is no JSON list, breaks off or is not UTF-8; names the line; what came before has been
            yielded.
    """
    decode = json.JSONDecoder().raw_decode
    text, count, opened, closed, problem, line = '', 0, False, False, 'not a JSON list', 1
    with open(path, encoding=encoding_of(path), newline='\n') as file:
        for piece in iter(partial(read_piece, file, chunk, path), ''):
            text, at = text + piece, 0
            blank = len(text) - len(text.lstrip(BLANK))
            line, text = line + text.count('\n', 0, blank), text[blank:]
            if not opened and (mark := OPENING.match(text)):
                opened, at = True, mark.end()
            if opened and not count and not closed and (mark := CLOSING.match(text, at)):
                closed, at = True, mark.end()
            line += text.count('\n', 0, at)
            while opened and not closed:
                try:
                    item, end = decode(text, at)
                except json.JSONDecodeError as error:
                    problem = error.msg
                    break  # the item's end may be in the next piece
                except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
                    raise ValueError(f'{path}, line {line}: item {count + 1}: {str(error)[:80]}') from None
                if not (mark := NEXT.match(text, end)):
                    problem = 'no comma or closing bracket after it'
                    break  # so may the rest of a number
                yield line, item
                line += text.count('\n', at, mark.end())
                at, count, closed = mark.end(), count + 1, mark[1] == ']'
            text = text[at:]
            if len(text) > LONGEST:
                break
    if not closed or text.strip(BLANK):
        raise ValueError(f'{path} breaks off after {count} items, in line {line}: {problem}')


def read_piece(file, size: int, path: str | os.PathLike) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError:
        read_text(path)  # says where
        raise
