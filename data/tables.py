"""Text files as people write them: encodings, JSON, and tables of image, caption and split (CSV or JSON lines)."""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils import logger, shorten

MARKS = {codecs.BOM_UTF8: 'utf-8-sig', codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}  # UTF-32's begins as UTF-16's: looked for first
DELIMITERS = {',': 'a comma', ';': 'a semicolon', '\t': 'a tab', '|': 'a bar'}
IMAGE = ('image', 'file_name', 'filename', 'image_name', 'image_path', 'path')  # names of a column, the likeliest first
CAPTION = ('caption', 'captions', 'text', 'comment')
NUMBERED = re.compile(r'(caption|text|comment)[ _-]?\d+')  # caption_0, caption_1 ...: several captions in a row
csv.field_size_limit(2 ** 26)  # characters; the default refuses a caption of 128 KiB


class Row(NamedTuple):
    """What an annotation says of an image; several rows may be of one image."""

    image: str  # as the annotation names it
    captions: list[str]
    split: str | None = None
    line: int | None = None  # of the annotation


def encoding_of(path: str | os.PathLike) -> str:
    """By the byte-order mark; UTF-8 without one."""
    with open(path, 'rb') as file:
        start = file.read(4)
    return next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), 'utf-8')


def read_text(path: str | os.PathLike) -> str:
    """A text file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.

    Raises:
        ValueError: another encoding, or no text; names the line and what it might be.
    """
    encoding, data = encoding_of(path), Path(path).read_bytes()
    if encoding in ('utf-16', 'utf-32'):
        logger.info('%s is in %s', path, encoding.upper())
    try:
        # of any encoding, if it holds NUL bytes, of which an error tells below
        text = data.decode('latin-1' if b'\0' in data and encoding.startswith('utf-8') else encoding)
    except UnicodeDecodeError as error:
        line, begin = data.count(b'\n', 0, error.start) + 1, data.rfind(b'\n', 0, error.start) + 1
        piece = data[max(begin, error.start - 12):error.start + 12].partition(b'\n')[0]
        try:
            guess = f'; in Windows-1252 it would be {shorten(piece.decode("cp1252"))}'
        except UnicodeDecodeError:
            guess = ''
        raise ValueError(f'{path}, line {line}: {shorten(piece)} is not {encoding.upper()}{guess}. Save the file in '
                         f'UTF-8') from None
    if '\0' in text:
        line = text.count('\n', 0, text.index('\0')) + 1
        raise ValueError(f'{path}, line {line}: a NUL byte: this is no text file, or UTF-16 without a byte-order mark. '
                         f'Save the file in UTF-8')
    return text


def parse_json(text: str, path: str | os.PathLike, line: int = 1, **options):
    """Args:
        line: the number of the text's first line in the file.
        options: of `json.loads`.

    Raises:
        ValueError: no JSON; names file and line.
    """
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}, line {line + error.lineno - 1}: not JSON ({error.msg} at column {error.colno})') \
            from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise ValueError(f'{path}, line {line}: not readable as JSON ({str(error)[:80]})') from None


def read_json(path: str | os.PathLike):
    """The content of a JSON file; for errors see `read_text` and `parse_json`."""
    return parse_json(read_text(path), path)


def shown(names) -> str:
    """Column names for a message, shortened."""
    return ', '.join(repr(str(name)[:40]) for name in list(names)[:8]) or 'nothing'


def columns(names: list[str]) -> tuple[str | None, list[str], list[str]]:
    """The columns of the image and of its captions among the names, which are in lower case, and what is missing."""
    image = next((name for name in IMAGE if name in names), None)
    captions = [name for name in CAPTION if name in names][:1] or [name for name in names if NUMBERED.fullmatch(name)]
    return image, captions, [kind for kind, found in (('image', image), ('caption', captions)) if not found]


def read_table(path: Path) -> Iterator[Row]:
    """A CSV file with a header line (comma, semicolon, tab or bar) or JSON lines, where a caption may be a list.

    The columns are image (or file_name ...), caption (or text, or caption_0, caption_1 ...) and, if need be, split, in
    small letters or capitals.

    Raises:
        ValueError: names file and line: a missing column or field, a field too many, no text, no JSON.
    """
    records = read_json_lines(path) if path.suffix.lower() == '.jsonl' else read_csv(path)
    for line, record in records:
        image, captions, missing = columns(list(record))
        if missing:
            raise ValueError(f'{path}, line {line}: no {" and no ".join(missing)}; found {shown(record)}')
        texts = [text for name in captions for text in as_list(record[name])]
        texts = [text for text in texts if text is not None and text == text]  # neither null nor NaN
        name, split = record[image], record.get('split') or None
        for value in (name, *texts, *([split] if split else [])):
            if not isinstance(value, str):
                raise ValueError(f'{path}, line {line}: {shorten(value)} is no text')
        if not name.strip():
            raise ValueError(f'{path}, line {line}: no image is named')
        yield Row(name.strip(), texts, split and split.strip(), line)


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(read_text(path).split('\n'), 1):  # not splitlines: a JSON text may hold U+2028
        if text.strip():
            record = parse_json(text, path, line, object_pairs_hook=tuple)  # which may hold a name twice
            if not isinstance(record, tuple):
                raise ValueError(f'{path}, line {line}: not a JSON object but {shorten(text.strip())}')
            names = [name.strip().lower() for name, _ in record]
            check_once(names, f'{path}, line {line}')
            yield line, dict(zip(names, (value for _, value in record), strict=True))


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, fields by column) of a CSV file, whose delimiter is the one by which the header has the columns."""
    text = read_text(path)
    headers = {delimiter: header_of(text, delimiter, path) for delimiter in DELIMITERS}
    delimiter = next((delimiter for delimiter, header in headers.items() if not columns(header)[2]), None)
    if delimiter is None:
        header = max(headers.values(), key=lambda header: (-len(columns(header)[2]), len(header)))
        raise ValueError(f'{path}, line 1: the header has no column {" and no column ".join(columns(header)[2])}; '
                         f'found {shown(header)}')
    header = headers[delimiter]
    check_once(header, f'{path}, line 1')
    for number, (line, fields) in enumerate(csv_rows(text, delimiter, path)):
        if number and len(fields) != len(header):
            remedy = (f'text with {DELIMITERS[delimiter]} in it must be in quotation marks'
                      if len(fields) > len(header) else f'add what is missing, if only {DELIMITERS[delimiter]}')
            raise ValueError(f'{path}, line {line}: {len(fields)} fields, but the header has {len(header)}: {remedy}')
        if number:
            yield line, dict(zip(header, fields, strict=True))


def check_once(names: list[str], place: str) -> None:
    """Raises:
        ValueError: the image, the split or a caption is there twice, in small letters or capitals.
    """
    image, captions, _ = columns(names)
    for name in (image, *captions, 'split'):
        if names.count(name) > 1:
            raise ValueError(f'{place}: the column {shorten(name)} is there twice')


def header_of(text: str, delimiter: str, path: Path) -> list[str]:
    try:
        _, fields = next(csv_rows(text, delimiter, path), (1, []))
    except ValueError:  # it is not the delimiter
        return []
    return [name.strip().lower() for name in fields]


def csv_rows(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line that it starts in, fields) of the rows that are not blank."""
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(f'{path}, line {line}: {error}: are its quotation marks in pairs?') from None
        if fields is None:
            return
        if any(field.strip() for field in fields):
            yield line, fields
