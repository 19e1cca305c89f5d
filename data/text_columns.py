"""Arrow columns of texts. What most of them do not need shows in their bytes, and no python string is made of those."""

import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.captions import EDGES, one_line, storable

BLANK = ord(' ')
EDGE = np.frombuffer(EDGES.encode(), np.uint8)


def text_column(values: list) -> pa.StringArray:
    """Null for what is no text; lone surrogates are left out."""
    return pa.array([storable(value) if isinstance(value, str) else None for value in values], pa.string())


def utf8(texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """Where each text starts in the bytes that follow, and the last one ends, int32 [N + 1]; uint8."""
    _, offsets, data = texts.buffers()
    offsets = np.frombuffer(offsets, np.int32)[texts.offset:texts.offset + len(texts) + 1]
    data = np.frombuffer(data or b'', np.uint8)[offsets[0]:offsets[-1]]
    return offsets - offsets[0], data


def rows_of(offsets: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The texts that these places in their bytes belong to."""
    return np.searchsorted(offsets, places, 'right') - 1


def replaced(texts: pa.StringArray, rows: np.ndarray, function: Callable[[str], str]) -> pa.StringArray:
    """The texts, of which `rows` (bool [N]) are what a function makes of them."""
    if not rows.any():
        return texts
    mask = pa.array(rows)
    return pc.replace_with_mask(texts, mask, pa.array(map(function, texts.filter(mask).to_pylist()), texts.type))


def one_lines(texts: pa.StringArray) -> pa.StringArray:
    """`one_line` of each; '' for null."""
    texts = texts.fill_null('')
    offsets, data = utf8(texts)
    rows, blank = offsets[1:] == offsets[:-1], data == BLANK
    odd = (data < BLANK) | (data > ord('~'))  # unprintable, or not ASCII
    odd[1:] |= blank[1:] & blank[:-1]
    first, last = offsets[:-1][~rows], offsets[1:][~rows] - 1
    odd[first] |= np.isin(data[first], EDGE)
    odd[last] |= blank[last]
    rows[rows_of(offsets, np.flatnonzero(odd))] = True
    return replaced(texts, rows, one_line)


def quoted(texts: pa.StringArray) -> pa.StringArray:
    """JSON strings, without their quotation marks."""
    offsets, data = utf8(texts)
    rows = np.zeros(len(texts), bool)
    escaped = (data < BLANK) | (data == ord('"')) | (data == ord('\\'))
    rows[rows_of(offsets, np.flatnonzero(escaped))] = True
    return replaced(texts, rows, lambda text: json.dumps(text, ensure_ascii=False)[1:-1])
