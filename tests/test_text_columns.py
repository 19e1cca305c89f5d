import json

from hypothesis import given
from hypothesis import strategies as st

from data.captions import one_line
from data.text_columns import one_lines, quoted, text_column

TEXTS = st.lists(st.none() | st.integers() | st.text(st.characters()) | st.text(' ab."\\\n\x7f~é\ud83d'))


@given(TEXTS, st.integers(0, 3))
def test_columns_are_what_each_text_would_be(values, start):
    column = text_column(values).slice(start)
    assert one_lines(column).to_pylist() == [one_line(value) for value in values[start:]]
    texts = column.drop_null()
    assert quoted(texts).to_pylist() == [json.dumps(text, ensure_ascii=False)[1:-1] for text in texts.to_pylist()]
