"""Training that is hurt at random places must end as if nothing had happened.

    python -m bench.stress --trials 50

Each trial trains the demo's student (2 epochs of rendered scenes, CPU), hurts it at a random step, launches the same
command again until it ends, and compares weights, momentum encoder, queues, optimizer and logged losses with those of
an unhurt run, bit for bit. The injuries:

- SIGTERM, SIGINT: what a scheduler or Ctrl-C sends;
- SIGKILL: no time to save;
- killed while writing, disk full while writing: half a checkpoint;
- torn last.pth: SIGKILL, after which the checkpoint itself is cut in half;
- worker killed: SIGKILL of one of two processes under torchrun with --max-restarts.

`tests/test_recovery.py` runs one of each of those that no other test has.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

import json_dataset
import pretrain_dlip
from configs.rules import whole
from data import scene_layouts
from data.distributed import progress
from models.engine.logs import read_log
from models.weights.checkpoint import read_checkpoint
from utils import ROOT

SAVE_EVERY = 3
SIGNALS = {'SIGTERM': signal.SIGTERM, 'SIGINT': signal.SIGINT, 'SIGKILL': signal.SIGKILL}
INJURIES = (*SIGNALS, 'killed while writing', 'disk full while writing', 'torn last.pth', 'worker killed')
FORK = multiprocessing.get_context('fork')  # a process starts at once: what it needs is imported


def prepare(folder: Path, size: str, image_size: int) -> list[str]:
    """Render a few scenes -> the arguments of `pretrain_dlip.py` for a short run on them."""
    scenes = folder / 'scenes'
    with contextlib.redirect_stdout(None):
        scene_layouts.main(['--out', str(scenes), '--pretrain', '60', '--flickr_train', '5', '--flickr_val', '1',
                            '--flickr_test', '1', '--workers', '1'])
        json_dataset.main(['--root', str(scenes), '--out', str(scenes), '--workers', '1'])
    return ['--config', str(ROOT / 'configs/demo/pretrain.yaml'), '--device', 'cpu', 'teacher.weights=null',
            'model.init_vision=null', 'model.init_text=null', f'model.size={size}', f'model.image_size={image_size}',
            f'tokenizer={scenes}/vocab.txt', f'data.train={scenes}/all.json', 'ita.queue_size=20', 'train.epochs=2',
            'train.batch_size=8', 'train.precision=fp32', 'train.log_every=1', f'train.save_every={SAVE_EVERY}']


def train(arguments: list[str], out: Path, hurt=None) -> None:
    """One launch, in this process; what it prints goes to OUT.log."""
    with open(out.with_suffix('.log'), 'a') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if hurt:
            hurt()
        try:
            pretrain_dlip.main(['--output_dir', str(out), *arguments])
        except (OSError, ValueError) as error:
            print(f'error: {error}')
            sys.exit(1)


def at_save(number: int, injury) -> None:
    """Let `injury(state, file)` take the place of the `number`-th `torch.save`."""
    save, left = torch.save, [number]

    def counted(state, file):
        left[0] -= 1
        return injury(state, file) if left[0] == 0 else save(state, file)
    torch.save = counted


def half_a_file(state, file) -> None:
    file.write(b'half a checkpoint' * 1000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(state, file, save=torch.save) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    save(state, file)


def steps_done(out: Path) -> int:
    return len(read_log(out / 'steps.txt'))


def signal_at(process, out: Path, step: int, number: int) -> None:
    """Send a signal once `step` steps are logged, unless the process ends before."""
    while process.is_alive() and steps_done(out) < step:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def launch(arguments: list[str], out: Path, hurt=None):
    process = FORK.Process(target=train, args=(arguments, out, hurt))
    process.start()
    return process


def torchrun(arguments: list[str], out: Path) -> subprocess.Popen:
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=3',
               'pretrain_dlip.py', '--output_dir', str(out), *arguments, 'train.batch_size=4']
    with open(out.with_suffix('.log'), 'a') as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def launch_two(arguments: list[str], out: Path) -> None:
    """What `torchrun` starts, unhurt, without the time that it takes to start."""
    def join(rank: int) -> None:
        os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost',
                       'MASTER_PORT': str(port)}
    port = get_free_port()
    both = [launch([*arguments, 'train.batch_size=4'], out, partial(join, rank)) for rank in range(2)]
    while None in (ends := [process.exitcode for process in both]) and not any(ends):
        time.sleep(0.02)
    if any(ends):
        for process in both:
            process.kill()  # the other one would wait for the one that failed
        raise RuntimeError(out.with_suffix('.log').read_text()[-3000:])


def workers_of(agent: int) -> list[int]:
    """The processes that a torchrun started."""
    found = []
    for path in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            parent = path.joinpath('stat').read_text().rpartition(')')[2].split()[1]
            if int(parent) == agent and b'RANK=' in path.joinpath('environ').read_bytes():
                found.append(int(path.name))
    return sorted(found)


def trial(injury: str, arguments: list[str], out: Path, dice: random.Random, steps: int) -> int:
    """Hurt a run once and bring it to its end -> steps that were done again."""
    at, done = dice.randrange(1, steps), 0
    if injury == 'worker killed':
        process = torchrun(arguments, out)
        while process.poll() is None and steps_done(out) < at:
            time.sleep(0.01)
        for worker in workers_of(process.pid)[dice.randrange(2):][:1]:  # none, if it ended just now
            os.kill(worker, signal.SIGKILL)
        done = steps_done(out)
        if process.wait():
            raise RuntimeError(f'torchrun gave up: {out.with_suffix(".log").read_text()[-3000:]}')
    else:
        writing = {'killed while writing': half_a_file, 'disk full while writing': full_disk}.get(injury)
        saves = dice.randrange(1, steps // SAVE_EVERY)
        process = launch(arguments, out, lambda: at_save(saves, writing) if writing else None)
        if not writing:
            signal_at(process, out, at, SIGNALS.get(injury, signal.SIGKILL))
        process.join()
        done = steps_done(out)
        if injury == 'torn last.pth' and (out / 'last.pth').exists():
            os.truncate(out / 'last.pth', (out / 'last.pth').stat().st_size // 2)
            if not list(out.glob('epoch*.pth')):
                (out / 'last.pth').unlink()  # the only one there was: a user is told to delete it and start again
        process = launch(arguments, out)
        process.join()
        if process.exitcode:
            raise RuntimeError(f'{injury}: the second launch failed: {out.with_suffix(".log").read_text()[-500:]}')
    found = re.findall(r'resumed \S+ at epoch (\d+), batch (\d+) of (\d+)', out.with_suffix('.log').read_text())
    epoch, batch, of = map(int, found[-1]) if found else (0, 0, 1)
    return max(0, done - epoch * of - batch)


def same(a, b) -> bool:
    """Equal to the last bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(out: Path, reference: Path) -> list[str]:
    """What is not equal between two finished runs."""
    states = [read_checkpoint(folder / 'last.pth') for folder in (out, reference)]
    parts = [part for part in ('model', 'objective', 'optimizer', 'epoch', 'batch', 'best', 'meters')
             if not same(states[0][part], states[1][part])]
    return parts + [name for name in ('steps.txt', 'log.txt') if read_log(out / name) != read_log(reference / name)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trials', type=whole(1), default=50, help='default: %(default)s')
    parser.add_argument('--size', default='bench/sizes.yaml:micro',
                        help='a block of configs/sizes.yaml, or FILE:BLOCK (default: %(default)s)')
    parser.add_argument('--image_size', type=whole(1), default=64, help='default: %(default)s')
    parser.add_argument('--injuries', nargs='+', choices=INJURIES, default=INJURIES, metavar='NAME',
                        help=f'default: {", ".join(INJURIES)}')
    parser.add_argument('--seed', type=whole(0, 2 ** 32 - 1), default=0, help='of the injuries (default: %(default)s)')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a process with threads of its own cannot be forked
    dice, counts, redone, failed = random.Random(args.seed), Counter(), Counter(), []
    with tempfile.TemporaryDirectory() as place:
        arguments = prepare(Path(place), args.size, args.image_size)
        references = {kind: Path(place) / kind for kind in ('one', 'two')}
        launch(arguments, references['one']).join()
        if 'worker killed' in args.injuries:
            launch_two(arguments, references['two'])
        steps = steps_done(references['one'])
        for number in progress(range(args.trials), desc='trials'):
            injury, out = args.injuries[number % len(args.injuries)], Path(place) / f'trial{number}'
            out.mkdir()
            again = trial(injury, arguments, out, dice, steps)
            wrong = differences(out, references['two' if injury == 'worker killed' else 'one'])
            limit = SAVE_EVERY * (2 if injury == 'torn last.pth' else 1)
            if wrong or again > limit:
                failed.append(f'trial {number}, {injury}: {", ".join(wrong) or f"{again} steps were done again"}')
            counts[injury] += 1
            redone[injury] = max(redone[injury], again)
    print(f'{args.trials} runs of {steps} steps, saved every {SAVE_EVERY}\n')
    print('| injury | runs | steps done again, at most |')
    print('|---|---:|---:|')
    for injury in counts:
        print(f'| {injury} | {counts[injury]} | {redone[injury]} |')
    print(f'\n{args.trials - len(failed)} of {args.trials} ended bit for bit as the unhurt run.')
    if failed:
        sys.exit('\n'.join(failed))


if __name__ == '__main__':
    main()
