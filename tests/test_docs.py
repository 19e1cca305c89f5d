"""The page of DLIPProd: written from the docstrings, and true; the notebook: runs."""

import doctest

import nbformat
from nbclient import NotebookClient

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


def test_the_notebook_runs_from_top_to_bottom_and_shows_what_it_stores():
    path = ROOT / 'prod/demo.ipynb'
    stored, fresh = (nbformat.read(path, 4) for _ in range(2))
    NotebookClient(fresh, timeout=120, resources={'metadata': {'path': str(path.parent)}}).execute()
    assert printed(fresh) == printed(stored), 'run the notebook and save it'
    assert str(fresh).count('image/png') == 5 and path.stat().st_size < 400_000


def printed(notebook) -> str:
    return ''.join(output.text for cell in notebook.cells for output in cell.get('outputs', [])
                   if output.get('name') == 'stdout')
