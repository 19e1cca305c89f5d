"""Arrow columns of texts. A regular expression finds the few that need a change: only those become Python strings."""

import json
import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from data.captions import EDGES, one_line, storable

# Empty, unprintable or not ASCII, white space to be removed, or an edge of a caption without a word
UNEVEN = f'^$|[^ -~]|  | $|^[{re.escape(EDGES)}]'
ESCAPED = r'[\x00-\x1f"\\]'  # in JSON


def text_column(values: list) -> pa.StringArray:
    """Null for what is no text; lone surrogates are left out."""
    return pa.array([storable(value) if isinstance(value, str) else None for value in values], pa.string())


def replaced(texts: pa.StringArray, pattern: str, function: Callable[[str], str]) -> pa.StringArray:
    """The texts, of which those that match are what a function makes of them."""
    mask = pc.match_substring_regex(texts, pattern)
    return pc.replace_with_mask(texts, mask, pa.array(map(function, texts.filter(mask).to_pylist()), texts.type))


def one_lines(texts: pa.StringArray) -> pa.StringArray:
    """`one_line` of each; '' for null."""
    return replaced(texts.fill_null(''), UNEVEN, one_line)


def quoted(texts: pa.StringArray) -> pa.StringArray:
    """JSON strings, without their quotation marks."""
    return replaced(texts, ESCAPED, lambda text: json.dumps(text, ensure_ascii=False)[1:-1])
