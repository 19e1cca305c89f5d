"""The options that every command over DLIPProd takes."""

import argparse
import inspect
import logging
import os
import re
import sys
from pathlib import Path
from types import UnionType
from typing import get_args

from configs.rules import Number, output_path, whole
from models.engine.launch import setup_process
from prod import DLIPProd
from utils import shorten

POSITIVE = whole(1)


def net_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    parser.add_argument('--precision', default='fp32', help='fp32, bf16, int8; of ONNX graphs, what they were '
                        'exported with (default: %(default)s)')
    parser.add_argument('--backend', default='torch', help='torch, openvino, or onnx for a folder of '
                        'ONNX graphs (default: %(default)s)')
    parser.add_argument('--memory', type=Number(0, 10_000, above=True), default=1.0, metavar='GIB', help='for a batch '
                        'at work, and for decoding an image; larger images are left out (default: %(default)s)')


def net_settings(args: argparse.Namespace) -> dict:
    """What `net_options` read, as DLIPProd's arguments."""
    return {'device': str(setup_process(args.device)), 'precision': args.precision, 'backend': args.backend,
            'memory': args.memory}


def log_to_stderr() -> None:
    """For a command whose standard output other programs read; after `net_settings`."""
    for handler in logging.getLogger().handlers:
        handler.setStream(sys.stderr)


def generate_options(parser: argparse.ArgumentParser) -> None:
    """An option for each setting of `DLIPProd.generate`, under its name and with what its docstring says."""
    said = dict(re.findall(r'^    (\S.*?): ((?:.+|\n {5,})+)', inspect.getdoc(DLIPProd.generate), re.MULTILINE))
    texts = {name: ' '.join(text.split()) for names, text in said.items() for name in names.split(', ')}
    group = parser.add_argument_group('captions')
    for name, kinds in generate_kinds().items():
        how = {'action': 'store_true'} if bool in kinds else {'action': 'append'} if list in kinds else \
            {'type': POSITIVE if name in ('num_beams', 'num_captions') else kinds[0]}
        more = ' May be repeated.' if list in kinds else ''
        group.add_argument(f'--{name}', **how, default=None, help=texts[name].replace('%', '%%') + more)


def generate_settings(args: argparse.Namespace) -> dict:
    """Those settings of `generate_options` that were given."""
    return {name: getattr(args, name) for name in generate_kinds() if getattr(args, name) is not None}


def generate_kinds() -> dict[str, tuple[type, ...]]:
    """Setting of `DLIPProd.generate` -> what it may be; without those that a command answers for itself."""
    own = ('self', 'images', 'scores', 'batch_size', 'bgr', 'on_error')
    return {name: get_args(item.annotation) if isinstance(item.annotation, UnionType) else (item.annotation,)
            for name, item in inspect.signature(DLIPProd.generate).parameters.items() if name not in own}


def output_file(text: str) -> Path:
    """argparse's type of a file to be written."""
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f'must name a file, got the folder {shorten(text)}')
    return output_path(text)
