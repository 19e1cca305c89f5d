"""Write prod/README.md, the page of DLIPProd, from the docstrings (a test runs its examples and holds it to them).

    python -m prod.docs
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import inspect
import re
import textwrap
from pathlib import Path

from prod import DLIPProd
from prod.images import find_images
from prod.index import ImageIndex

PAGE = Path(__file__).parent / 'README.md'
INTRO = '''# DLIPProd

A trained checkpoint as a captioner and a retriever, for notebooks and services. Every example below runs in a fresh
clone, from the repository's root, on the demo's teacher and the images of [prod/examples](examples); a test runs
them. [demo.ipynb](demo.ipynb) shows the same with images. This page is written by `python -m prod.docs` from the
docstrings.

```python
>>> from prod import DLIPProd
```

'''
COMMANDS = '''## Commands

| command | does |
|---|---|
| `python -m prod.caption FOLDER --weight W --out captions.jsonl` | captions a folder: .jsonl, .csv, .parquet; goes on |
| `python -m prod.caption FOLDER --weight W --sidecar` | writes the caption of IMAGE.jpg to IMAGE.txt |
| `python -m prod.search FOLDER QUERY ... --weight W --index I` | finds the images that fit a text or an image |
| `python -m prod.app --caption W --retrieval W --folder F --index I` | a web page that does both, on this machine |
| `python -m prod.try_it --caption W --retrieval W IMAGE ...` | captions images and scores the captions |
| `python prod/shards.py SHARDS --out DIR --caption W --retrieval W --min_itm 0.5` | captions, scores, embeds and \
filters img2dataset's tars: BLIP's CapFilt on Ray |
| `python -m prod.export W TARGET` | a checkpoint as one file, or a folder for the Hugging Face hub |
| `python -m prod.export W FOLDER --format onnx` | a checkpoint as ONNX graphs |

Each says more with `--help`.
'''


def markdown(docstring: str) -> str:
    """A docstring with its sections as bold lines, their entries as lists and its examples as code."""
    lines, code = [], False
    for line in inspect.cleandoc(docstring).splitlines():
        if line.startswith('>>> ') and not code:
            lines += ['```python']
            code = True
        elif code and not line:
            lines += ['```']
            code = False
        heading = re.fullmatch(r'(Args|Raises|Returns):', line)
        if heading:
            lines += [f'**{heading[1]}**', '']
        elif not code and re.match(r' {4}\S', line):
            name, colon, text = line.strip().partition(':')
            lines.append(f'- `{name}`:{text}' if colon and re.fullmatch(r'[\w, .]+', name) else f'- {line.strip()}')
        else:
            lines.append(line if code else re.sub(r'^ {8}', '  ', line))
    return '\n'.join(lines + ['```'] * code)


def section(title: str, item, depth: int = 2) -> str:
    return f'{"#" * depth} {title}\n\n{markdown(item.__doc__)}\n\n'


def methods(cls: type, owner: str) -> str:
    parts = []
    for name, item in vars(cls).items():
        function = item.__func__ if isinstance(item, classmethod) else item
        if not name.startswith('_') and inspect.isfunction(function):
            signature = re.sub(r'\((self|cls), |prod\.index\.|torch\.(?=Tensor)',
                               lambda found: '(' if found[1] else '', str(inspect.signature(function)))
            called = textwrap.fill(f'{cls.__name__ if isinstance(item, classmethod) else owner}.{name}{signature}', 110,
                                   subsequent_indent='    ')
            parts.append(f'### {owner}.{name}\n\n```\n{called}\n```\n\n{markdown(function.__doc__)}\n\n')
    return ''.join(parts)


def page() -> str:
    return (INTRO + section('The class', DLIPProd) + methods(DLIPProd, 'dlip') + section('The index', ImageIndex)
            + methods(ImageIndex, 'index') + section('find_images', find_images) + COMMANDS)


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
    print(PAGE)
