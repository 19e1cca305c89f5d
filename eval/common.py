"""What the evaluation scripts share: their options, the share of each process, and loading images."""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import Subset

from configs.rules import output_path
from data.distributed import progress, rank, world_size
from data.loader import load
from models.weights.originals import VOCABULARY
from utils import atomic_write


def evaluation_parser(description: str, config: str) -> argparse.ArgumentParser:
    """The options of an evaluation of a Flickr30K split; what is read from them: `load_config(args.config, ...)`."""
    parser = checkpoint_parser(description)
    parser.add_argument('--config', default=config, help='YAML file of the training (default: %(default)s)')
    parser.add_argument('--teacher', metavar='CHECKPOINT', help='another checkpoint, to stand beside it in the table')
    parser.add_argument('--split', default='test', choices=('train', 'val', 'test'))
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='override a setting, e.g. eval.batch_size=16')
    return parser


def checkpoint_parser(description: str, output_dir: str = 'output/eval') -> argparse.ArgumentParser:
    """The options of every script that evaluates a checkpoint."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='a .pth of this repository, of BLIP or of '
                        'dlip-v2, a folder in the layout of transformers, or the name of one on the hub')
    machine_options(parser, output_dir)
    return parser


def tokenizer_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--tokenizer', default=VOCABULARY, help='vocabulary of a BLIP or dlip-v2 file, which carries '
                        'none: hub name, folder or vocab.txt (default: %(default)s)')


def machine_options(parser: argparse.ArgumentParser, output_dir: str) -> None:
    tokenizer_option(parser)
    parser.add_argument('--output_dir', default=output_dir, type=output_path, help='default: %(default)s')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')


def compared(args: argparse.Namespace) -> dict[str, str]:
    """Name -> checkpoint of the nets that the options ask for, the teacher first."""
    return {'teacher': args.teacher, 'student': args.checkpoint} if args.teacher else {'checkpoint': args.checkpoint}


def shard(count: int) -> range:
    """The contiguous part of 0..count - 1 that this process works on."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def image_batches(dataset, indices: range, batch_size: int, workers: int, desc: str):
    """Batches [<= batch_size, 3, S, S] of the images `indices`, with a progress bar."""
    return progress(load(Subset(dataset, indices), workers, batch_size=batch_size), desc=desc)


def spread(total: int, count: int) -> list[int]:
    """`count` indices evenly over 0..total - 1: what is shown is not hand-picked."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def hardware(device: torch.device) -> str:
    """What a timing was taken on: the number of CPU threads, or the accelerator's name."""
    if device.type == 'cpu':
        return f'{torch.get_num_threads()} CPU threads'
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type


def write_json(path: Path, content) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=1)
        file.write('\n')
