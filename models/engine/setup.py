"""Set-up that the training scripts share."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from configs import script_arguments
from data.distributed import rank, seed_everything, world_size
from data.folders import run_folder
from data.loader import make_loader
from models.blip import BLIP
from models.engine.launch import setup_process
from models.engine.run_state import RunState
from models.engine.stopping import STOP
from models.tokenizer import Tokenizer
from models.weights.build import at_resolution, build_student, build_teacher
from models.weights.sources import load_tokenizer


@contextmanager
def script_run(description: str, config: str, output_dir: str, argv: list[str] | None, tests: bool = False
               ) -> Iterator[tuple[argparse.Namespace, dict, torch.device, Path]]:
    """Read options and config, handle signals, join the other processes, lock the output folder for this run and seed:
    what every training script starts with -> (args, config, device, output folder).

    Args:
        tests: the script ends with the test split (see `script_arguments`).
    """
    args, settings = script_arguments(description, config, output_dir, argv, tests)
    STOP.listen()
    device = setup_process(args.device)
    stages = ['scst'] if settings.get('scst', {}).get('epochs') else []
    with run_folder(args, *stages) as folder:
        seed_everything(args.seed)
        yield args, settings, device, folder


def build_nets(config: dict, task: str) -> tuple[Tokenizer, BLIP, BLIP | None]:
    """The tokenizer, the student as the config initialises it, and the frozen teacher (or None) at the student's image
    size."""
    tokenizer = load_tokenizer(config['tokenizer'])
    teacher = build_teacher(config, tokenizer, task)
    student = build_student(config['model'], tokenizer, task, teacher)
    return tokenizer, student, teacher and at_resolution(teacher, config['model']['image_size'])


def epoch_loader(run: RunState, dataset) -> DataLoader:
    """A loader of the remaining batches of the current epoch."""
    config = run.config
    return make_loader(dataset, config['train']['batch_size'], seed=run.seed, epoch=run.epoch, start_batch=run.batch,
                       workers=config['data']['num_workers'], rank=rank(), world_size=world_size())
