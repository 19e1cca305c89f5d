"""The page of DLIPProd: written from the docstrings, and true."""

import doctest

from prod import docs
from utils import ROOT


def test_the_page_is_that_of_the_docstrings():
    assert docs.PAGE.read_text(encoding='utf-8') == docs.page(), 'run python -m prod.docs'


def test_its_examples_run(tmp_path, monkeypatch):
    for name in ('prod', 'data'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    text = docs.PAGE.read_text(encoding='utf-8').replace('```', '')  # a fence is no output
    test = doctest.DocTestParser().get_doctest(text, {}, docs.PAGE.name, str(docs.PAGE), 0)
    found = doctest.DocTestRunner().run(test)
    assert found.attempted > 10 and found.failed == 0
