"""The folders import in one direction, and training needs neither prod nor its optional packages."""

import ast
import re
from pathlib import Path

from utils import ROOT

# Each folder may import from itself and from those before it; `scripts` are the files of the repository's root.
ORDER = ('utils', 'configs', 'data', 'models', 'models/generation', 'models/weights', 'models/distill', 'models/engine',
         'eval', 'scripts')
OPTIONAL = {'openvino', 'onnx', 'onnxruntime', 'gradio', 'ray'}


def folder_of(module: str) -> str | None:
    """Of a module of the repository: 'models.weights.checkpoint' -> 'models/weights'; None for a library's."""
    path = ROOT / module.replace('.', '/')
    if path.with_suffix('.py').is_file():
        path = path.parent
    elif not (path / '__init__.py').is_file():
        return None
    if path == ROOT:
        return 'utils' if module == 'utils' else 'scripts'
    return path.relative_to(ROOT).as_posix()


def imported(file: Path) -> set[str]:
    """The modules that a file names in its import statements, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f'{node.module}.{alias.name}' if folder_of(f'{node.module}.{alias.name}') else node.module
                      for alias in node.names}
    return names


def test_imports_go_in_one_direction():
    files = [*ROOT.glob('*.py'), *(file for folder in ('configs', 'data', 'models', 'eval', 'prod')
                                   for file in (ROOT / folder).rglob('*.py'))]
    for file in files:
        own = folder_of('.'.join(file.relative_to(ROOT).with_suffix('').parts))
        for module in imported(file):
            theirs = folder_of(module)
            if theirs is None and own != 'prod':
                assert module.partition('.')[0] not in OPTIONAL, f'{file} imports {module}'
            if theirs is None or theirs == own:
                continue
            assert theirs in (ORDER[:-1] if own == 'prod' else ORDER[:ORDER.index(own)]), f'{file} imports {module}'


def test_the_top_level_of_models_holds_the_net_and_its_losses():
    assert len(list((ROOT / 'models').glob('*.py'))) <= 9


def test_private_operators_of_torch_are_called_in_one_file():
    files = [file for folder in ('data', 'models', 'eval', 'prod') for file in (ROOT / folder).rglob('*.py')]
    assert [file.name for file in files if re.search(r'torch\.ops\.mkldnn', file.read_text())] == ['linear.py']
