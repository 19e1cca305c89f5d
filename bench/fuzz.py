"""Odd inputs and interruptions: each must end in the right answer or in a named error of one line.

    python -m bench.fuzz                                 # 10,000 cases, about half an hour on one core
    python -m bench.fuzz --only images --case 17         # one case again, with its traceback

The kinds of cases are those of tests/odd.py, and `interrupted`: a tool is stopped at random moments by SIGINT, SIGTERM,
SIGHUP or SIGKILL and launched again; it must leave no process behind and end with what an uninterrupted run gives.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import contextlib
import csv
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from configs.rules import whole
from data.json_lines import JsonLines
from prod.index import ImageIndex
from tests.odd import KINDS, World, play, random_checkpoint
from tests.processes import Python

SHARES = {'images': 38, 'objects': 10, 'configs': 20, 'sizes': 2, 'annotations': 8, 'pairs': 3, 'shards': 4,
          'genome': 2, 'tars': 3, 'checkpoints': 4, 'arguments': 5, 'interrupted': 1}  # percent of the cases
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
PATIENCE = 120  # seconds for a case with its launches
FORK = multiprocessing.get_context('fork')


# ---------------------------------------------------------------- interruptions

def captioning(place: Path, world: World) -> list:
    return ['-m', 'prod.caption', images(world) / 'few', '--weight', world.weight, '--out', place / 'captions.jsonl',
            '--device', 'cpu', '--batch_size', '2']


def captions(place: Path, world: World, printed: str) -> list:
    return sorted((line['path'], line['caption']) for line in JsonLines(place / 'captions.jsonl').read())


def texts_beside(place: Path, world: World) -> list:
    if not (place / 'images').exists():
        shutil.copytree(images(world) / 'few', place / 'images')
    return ['-m', 'prod.caption', place / 'images', '--weight', world.weight, '--out', place / 'images/metadata.csv',
            '--sidecar', '--existing', 'append', '--num_captions', '2', '--no_repeat_ngram_size', '3', '--forbid', 'a',
            '--device', 'cpu', '--batch_size', '2']


def texts_and_table(place: Path, world: World, printed: str) -> tuple:
    with open(place / 'images/metadata.csv', newline='', encoding='utf-8') as file:
        table = [row[:2] for row in csv.reader(file)]  # the rounding of scores depends on their batch
    return sorted(table), {path.name: path.read_bytes() for path in (place / 'images').glob('*.txt')}


def exporting(place: Path, world: World) -> list:
    return ['-m', 'prod.export', world.weight, place / 'onnx', '--format', 'onnx']


def searching(place: Path, world: World) -> list:
    return ['-m', 'prod.search', images(world), 'a red star', '--weight', world.weight, '--index', place / 'index',
            '--device', 'cpu']


def hits(place: Path, world: World, printed: str) -> tuple:
    probe, = world.dlip.get_image_feat(Image.linear_gradient('L'))
    index = ImageIndex(place / 'index', probe)
    return printed[printed.index('a red star'):], index.search(probe, len(index)), sorted(
        path.suffix for path in (place / 'index').iterdir())


def listing(place: Path, world: World) -> list:
    return ['json_dataset.py', '--root', scenes(world), '--out', place / 'lists', '--workers', '2']


def rendering(place: Path, world: World) -> list:
    return ['-m', 'data.scene_layouts', '--out', place / 'scenes', '--pretrain', '60', '--flickr_train', '5',
            '--flickr_val', '1', '--flickr_test', '1', '--workers', '2']


def contents(place: Path, world: World, printed: str) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob('*'))
            if path.is_file() and path.suffix not in ('.png', '.lock') and path.name != '.lock'
            and '.tmp' not in path.suffix}  # a SIGKILL leaves it


TOOLS: dict[str, tuple[Callable, Callable]] = {
    'prod.caption': (captioning, captions), 'prod.caption, texts': (texts_beside, texts_and_table),
    'prod.search': (searching, hits), 'prod.export, onnx': (exporting, contents), 'json_dataset': (listing, contents),
    'data.scene_layouts': (rendering, contents)}


@cache
def images(world: World) -> Path:
    """A folder of 600 images, three batches of an index, and in it one of 40."""
    folder, noise = world.folder / 'images', np.random.default_rng(0)
    (folder / 'few').mkdir(parents=True, exist_ok=True)
    for number in range(600):
        path = folder / (f'few/{number}.png' if number < 40 else f'{number}.png')
        Image.fromarray(noise.integers(0, 256, (4, 4, 3), np.uint8)).resize((24, 24)).save(path)
    return folder


@cache
def scenes(world: World) -> Path:
    launch(rendering(world.folder, world))
    return world.folder / 'scenes'


def launch(arguments: list) -> str:
    """Run a tool to its end -> what it printed."""
    done = Python(*arguments).wait(PATIENCE)
    assert done.returncode == 0, f'exit code {done.returncode}: {done.stderr[-500:]}'
    return done.stdout


@cache
def uninterrupted(tool: str, world: World) -> tuple[object, float]:
    """(result, seconds)"""
    arguments, result = TOOLS[tool]
    place = Path(tempfile.mkdtemp(dir=world.folder))
    given, start = arguments(place, world), time.monotonic()
    printed = launch(given)
    return result(place, world, printed), time.monotonic() - start


def children(pid: int) -> set[int]:
    """The processes that a process has started, and those that they have."""
    parents = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(')')[2].split()[1])
    found = {child for child, parent in parents.items() if parent == pid}
    return found.union(*(children(child) for child in found))


def interrupted(dice: random.Random, place: Path, world: World) -> None:
    """A tool that is stopped up to three times, and launched again."""
    tool = dice.choice(list(TOOLS))
    (arguments, result), (expected, seconds) = TOOLS[tool], uninterrupted(tool, world)
    for _ in range(dice.choice([1, 1, 2, 3])):
        process, number, left = Python(*arguments(place, world)), dice.choice(SIGNALS), set()
        try:
            time.sleep(dice.uniform(0, 1.1 * seconds))
            left = children(process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
            said = process.wait(60).stderr
        finally:
            process.kill()
        name = f'{tool}, {signal.Signals(number).name}'
        # what is stopped before its first line is Python's to end
        file = f'{tool.split(",")[0].replace(".", "/")}.py'
        assert not ('Traceback' in said and file in said), f'{name}: {said[-300:]}'
        end = time.monotonic() + 20
        while time.monotonic() < end and any(os.path.exists(f'/proc/{child}') for child in left):
            time.sleep(0.05)
        left = {child for child in left if os.path.exists(f'/proc/{child}')}
        assert not left, f'{name}: {len(left)} of its processes go on'
    found = result(place, world, launch(arguments(place, world)))
    assert found == expected, f'{tool}: {str(found)[:200]} instead of {str(expected)[:200]}'


KINDS['interrupted'] = interrupted


# ---------------------------------------------------------------- the run

def attempt(kind: str, seed: int, number: int, world: World) -> tuple[str, str]:
    """-> ('right', 'named error' or 'failure'; a line on it)"""
    try:
        outcome = play(kind, seed, number, world, seconds=PATIENCE if kind == 'interrupted' else 60)
        return 'right' if outcome == 'right' else 'named error', outcome
    except BaseException as error:
        return 'failure', f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def played(kind: str, seed: int, count: int, world: World):
    """The outcomes of the cases of a kind, in a process of their own that may die."""
    number = 0
    while number < count:
        with ProcessPoolExecutor(1, FORK) as pool:
            try:
                while number < count:
                    yield number, *pool.submit(attempt, kind, seed, number, world).result()
                    number += 1
            except BrokenProcessPool:
                yield number, 'failure', 'the process died'
                number += 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=whole(1), default=10_000, help='of all kinds together (default: %(default)s)')
    parser.add_argument('--seed', type=whole(0), default=0, help='default: %(default)s')
    parser.add_argument('--only', nargs='+', choices=SHARES, default=list(SHARES), metavar='KIND',
                        help=f'default: {", ".join(SHARES)}')
    parser.add_argument('--case', type=whole(0), help='play this one of a kind, in this process')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a process with threads of its own cannot be forked
    os.environ['HF_HUB_OFFLINE'] = '1'
    warnings.simplefilter('ignore')
    logging.disable()
    with tempfile.TemporaryDirectory() as place:
        weight = Path(place) / 'last.pth'
        random_checkpoint(weight)
        world = World(Path(place), weight)
        if args.case is not None:
            for kind in args.only:
                print(f'{kind} {args.case}: {play(kind, args.seed, args.case, world, PATIENCE)}')
            return
        rows, failures = [], []
        shares = sum(SHARES[kind] for kind in args.only)
        for kind in args.only:
            count, outcomes, start = max(1, round(args.cases * SHARES[kind] / shares)), Counter(), time.monotonic()
            for number, outcome, said in tqdm(played(kind, args.seed, count, world), kind, count, mininterval=1):
                outcomes[outcome] += 1
                if outcome == 'failure':
                    failures.append(f'--only {kind} --seed {args.seed} --case {number}: {said}')
                    tqdm.write(failures[-1])
            rows.append((kind, count, *(outcomes[name] for name in ('right', 'named error', 'failure')),
                         round(time.monotonic() - start)))
    totals = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    print('| kind | cases | right | named error | failures | seconds |\n|---|---:|---:|---:|---:|---:|')
    for row in [*rows, ('all', *totals)]:
        print(f'| {" | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in row)} |')
    if failures:
        sys.exit('\n'.join(['', 'failures, to be played again by python -m bench.fuzz with', *failures]))


if __name__ == '__main__':
    main()
