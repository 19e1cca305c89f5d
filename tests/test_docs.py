"""Documents: the page of DLIPProd is that of the docstrings and true, the notebook runs, figures are those measured."""

import ast
import doctest
import json
import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from bench import figures
from prod import docs
from utils import ROOT

pytestmark = pytest.mark.slow


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


# ---------------------------------------------------------------- figures

MEASURED = re.compile(r'\d\s*(%|x\b(?! \d)|(times|ms|s|seconds|minutes|hours|[GM]iB|pairs (a|per) second|images/s)\b)')


@pytest.mark.parametrize('path', figures.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_shows_the_figures_that_were_measured(path):
    text = path.read_text(encoding='utf-8')
    assert text == figures.filled(text), 'run python -m bench.figures'
    assert not re.search('^<!-- figure: ', text, re.MULTILINE), 'GitHub would end the paragraph there'


@pytest.mark.parametrize('path', [path for path in figures.documents() if path.name == 'README.md'],
                         ids=lambda path: path.parent.name)
def test_a_readme_has_no_figure_of_its_own(path):
    text = figures.MARK.sub('', path.read_text(encoding='utf-8'))
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.DOTALL)
    assert not [line for line in text.splitlines() if MEASURED.search(line)]


def test_links_between_documents_lead_somewhere():
    for path in [*figures.documents(), docs.PAGE]:
        for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', path.read_text(encoding='utf-8')):
            assert (path.parent / target).exists(), f'{path}: {target}'


def test_sections_that_messages_name_are_there():
    """A message says `(data/README.md, "Download")`."""
    named = [pair for path in (*ROOT.glob('*.py'), *ROOT.glob('[!.]*/**/*.py'))
             for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)
             for pair in re.findall(r'([\w/]*README[\w.]*), "([^"]+)"', node.value)]
    for document, section in named:
        assert re.search(f'^#+ {section}$', (ROOT / document).read_text(encoding='utf-8'), re.MULTILINE), document
    assert len(named) >= 3


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines()) <= 200


def test_tables_that_a_command_prints_become_figures_of_documents(tmp_path, monkeypatch):
    (tmp_path / 'bench').mkdir()
    (tmp_path / 'README.md').write_text('In <!-- figure: bench/x.json | On a CPU | ours, 8 | ms -->?<!-- end -->\n'
                                        '<!-- figures: bench/x.json | On a CPU | side x batch: ms --><!-- end -->\n'
                                        '<!-- figures: bench/y.json --><!-- end -->\n')
    monkeypatch.setattr(figures, 'ROOT', tmp_path)
    said = '## On a CPU\n\n| side | batch | ms |\n|---|---:|---:|\n| ours | 8 | 1.20 |\n| theirs | 8 | 3 |\n'
    for _ in range(2):
        figures.main(['x', '--', sys.executable, '-c', f'print({said!r})'])
    text = (tmp_path / 'README.md').read_text()
    assert 'In <!-- figure: bench/x.json | On a CPU | ours, 8 | ms -->1.20<!-- end -->' in text
    assert re.search(r'\| ours +\| +1.20 \|', text) and 'Not measured yet' in text
    run, = json.loads((tmp_path / 'bench/x.json').read_text())
    assert run['tables'] == {'On a CPU': [{'side': 'ours', 'batch': '8', 'ms': '1.20'},
                                          {'side': 'theirs', 'batch': '8', 'ms': '3'}]}
    assert {'command', 'date', 'commit', 'machine', 'minutes'} < run.keys()
    for place in ('On a GPU | ours | ms', 'On a CPU | ours, 9 | ms', 'On a CPU | ours, 8 | s'):
        with pytest.raises(ValueError, match='no table|not there'):
            figures.filled(f'<!-- figure: bench/x.json | {place} --><!-- end -->')


def printed(notebook) -> str:
    return ''.join(output.text for cell in notebook.cells for output in cell.get('outputs', [])
                   if output.get('name') == 'stdout')
