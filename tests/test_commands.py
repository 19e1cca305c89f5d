"""Every script runs by its path from any folder, as `python -m` does from the repository's."""

import re
import subprocess
import sys

import pytest
from processes import run_by_path

from configs import read_yaml
from utils import ROOT

pytestmark = pytest.mark.slow

SCRIPTS = [path for path in sorted([*ROOT.glob('*.py'), *ROOT.glob('[!.]*/*.py')]) if path.parent.name != 'tests'
           and 'def main(argv' in path.read_text()]


def test_the_scripts_are_found():
    assert {'prod/caption.py', 'eval/retrieval.py', 'data/scene_layouts.py', 'pretrain_dlip.py', 'bench/search.py'} <= {
        str(path.relative_to(ROOT)) for path in SCRIPTS}


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_help_from_another_folder(script, tmp_path):
    for name in ('utils.py', 'data.py', 'index.py', 'prod.py'):  # the user's own modules are not taken for ours
        (tmp_path / name).write_text('raise ImportError("a module of the user")')
    code, printed = run_by_path(script, ['--help'], tmp_path)
    assert code == 0 and printed.startswith('usage: ')


def test_a_notebook_elsewhere(folder, tmp_path):
    """README's line, and a command with relative paths in a process of its own."""
    line = re.search(r"import sys; sys\.path\.insert\([^`]*", (ROOT / 'README.md').read_text())[0]
    code = f"{line.replace('/path/to/DLIP', str(ROOT))}\nfrom prod import DLIPProd\nprint(DLIPProd)"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert 'prod.dlip.DLIPProd' in done.stdout, done.stderr
    (tmp_path / 'w.pth').symlink_to(folder / 'save/dlip_caption_flickr.pth')
    (tmp_path / 'images').symlink_to(ROOT / 'prod/examples')
    done = subprocess.run([sys.executable, ROOT / 'prod/caption.py', 'images', '--weight', 'w.pth', '--out',
                           'said.jsonl'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / 'said.jsonl').exists(), done.stderr


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_yaml('configs/pretrain.yaml') == read_yaml(ROOT / 'configs/pretrain.yaml')
    with pytest.raises(FileNotFoundError, match='no config file .*configs/absent.yaml'):
        read_yaml('configs/absent.yaml')
