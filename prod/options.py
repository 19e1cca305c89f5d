"""The options that every command over DLIPProd takes."""

import argparse
import os
from pathlib import Path

from configs.rules import Number
from models.engine.launch import setup_process
from utils import shorten


def net_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    parser.add_argument('--precision', default='fp32', help='fp32, bf16 or int8 (default: %(default)s)')
    parser.add_argument('--backend', default='torch', help='torch or openvino (default: %(default)s)')
    parser.add_argument('--memory', type=Number(0, 10_000, above=True), default=1.0, metavar='GIB', help='for a batch '
                        'at work, and for decoding an image; larger images are left out (default: %(default)s)')


def net_settings(args: argparse.Namespace) -> dict:
    """What `net_options` read, as DLIPProd's arguments."""
    return {'device': str(setup_process(args.device)), 'precision': args.precision, 'backend': args.backend,
            'memory': args.memory}


def output_file(text: str) -> Path:
    """argparse's type of a file to be written."""
    if not text.strip() or '\0' in text or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f'must name a file, got {shorten(text)}')
    return Path(text)
