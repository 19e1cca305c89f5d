"""Mechanics shared by the scripts: configs, processes, atomic files, progress bars."""

import argparse
import difflib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
TIMEOUT = timedelta(minutes=60)  # of what one process waits for another: evaluation may keep one busy
logger = logging.getLogger('dlip')


# ---------------------------------------------------------------- configs

def read_yaml(path: str | os.PathLike) -> dict:
    """Read a YAML mapping.

    Raises:
        FileNotFoundError, ValueError: the file is missing, is no YAML, or is no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no config file {path}: the shipped ones are in {ROOT / "configs"}')
    try:
        config = YAML(typ='safe').load(path)
    except YAMLError as error:
        raise ValueError(f'{path} is not valid YAML: {error}') from None
    if not isinstance(config, dict):
        raise ValueError(f'{path} must hold a mapping of settings')
    return config


def check_config(config: dict, schema: dict, source: str, prefix: str = '') -> None:
    """Compare a config with a reference config key by key: same keys, same types (null where either is null).

    Raises:
        ValueError: naming the key, the file and the nearest valid name.
    """
    for key in config:
        if key not in schema:
            near = difflib.get_close_matches(str(key), [str(k) for k in schema], n=1, cutoff=0.0)
            raise ValueError(f'{source}: unknown key "{prefix}{key}"; did you mean "{prefix}{near[0]}"?')
    for key, example in schema.items():
        name = f'{prefix}{key}'
        if key not in config:
            raise ValueError(f'{source}: missing key "{name}" (for example {name}: {example})')
        value = config[key]
        if isinstance(example, dict):
            if not isinstance(value, dict):
                raise ValueError(f'{source}: "{name}" must be a mapping with {", ".join(example)}; got {value!r}')
            check_config(value, example, source, f'{name}.')
        elif value is None or example is None:
            if isinstance(value, dict) or (value is None and isinstance(example, int | float)):
                raise ValueError(f'{source}: "{name}" must be like {example!r}; got {value!r}')
        else:
            expected = (int, float) if type(example) is float else type(example)
            if not isinstance(value, expected) or isinstance(value, bool) != isinstance(example, bool):
                raise ValueError(f'{source}: "{name}" must be {type(example).__name__} like {example!r}; got {value!r}')


def apply_override(config: dict, override: str) -> None:
    """Set one `a.b=value` in place; the value is read as YAML."""
    name, equals, text = override.partition('=')
    if not equals:
        raise ValueError(f'override {override!r} is not of the form key=value')
    *parents, leaf = name.split('.')
    node = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        keys = list(flat_keys(config))
        near = difflib.get_close_matches(name, keys, n=1, cutoff=0.0)
        raise ValueError(f'command line: unknown key "{name}"; did you mean "{near[0]}"?')
    node[leaf] = YAML(typ='safe').load(text) if text else None


def flat_keys(config: dict, prefix: str = ''):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat_keys(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}'


def load_config(path: str | os.PathLike, schema: str | os.PathLike, overrides: list[str] = ()) -> dict:
    """Read a config, apply `key=value` overrides and check it against a shipped reference config."""
    config, reference = read_yaml(path), read_yaml(ROOT / schema)
    check_config(config, reference, str(path))
    for override in overrides:
        apply_override(config, override)
    check_config(config, reference, 'command line' if overrides else str(path))
    return config


def script_arguments(description: str, config: str, output_dir: str, argv: list[str] | None = None,
                     tests: bool = False) -> tuple:
    """Parse the options that every training script takes -> (namespace, config checked against the default).

    Args:
        tests: the script ends with the test pictures, which an option leaves alone.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=config, help='YAML file (default: %(default)s)')
    parser.add_argument('--output_dir', default=output_dir, help='checkpoints and logs (default: %(default)s); '
                        'a run found there is resumed')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    parser.add_argument('--seed', default=42, type=int)
    parser.add_argument('--dry_run', action='store_true', help='check everything, train a few steps, write nothing and '
                        'print what the run will take')
    parser.add_argument('--store_teacher', type=int, metavar='EPOCHS', help="write the teacher's targets of this many "
                        'epochs to the folder teacher.cache, which is then trained from without the teacher')
    if tests:
        parser.add_argument('--no_test', action='store_true', help='leave the test pictures alone, as for choosing '
                            'settings; eval.report and its like measure best.pth later')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='override a setting, e.g. optim.lr=1e-4')
    args = parser.parse_intermixed_args(argv)  # overrides before and after options
    return args, load_config(args.config, config, args.overrides)


@contextmanager
def clean_exit():
    """Turn an expected failure (bad input) into one line on stderr and exit code 1, without a traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        if os.environ.get('DLIP_TRACEBACK'):
            raise
        sys.exit(f'error: {error}')


# ---------------------------------------------------------------- processes

def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def setup_process(device: str = 'auto') -> torch.device:
    """Join the process group when launched by torch.distributed.run; choose the device; set up logging.

    Raises:
        ValueError: the device is absent, or more processes than GPUs were asked for on this machine.
    """
    local_rank, local_size = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    chosen = choose_device(device)
    if chosen.type == 'cuda':
        if local_size > torch.cuda.device_count():
            raise ValueError(f'--nproc_per_node={local_size}, but this machine has {torch.cuda.device_count()} GPUs: '
                             f'lower it, or train on the CPU with --device cpu')
        if 'LOCAL_RANK' in os.environ or chosen.index is None:
            chosen = torch.device('cuda', local_rank)
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # oneDNN keeps a kernel for each shape. As texts are not padded, every training step brings new ones, and the 1024
    # that it keeps by default are a third of a gigabyte that is never used again.
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '128')
    if 'RANK' in os.environ and not dist.is_initialized():
        store, number, count = next(dist.rendezvous('env://', timeout=TIMEOUT))
        backend = 'cpu:gloo,cuda:nccl' if chosen.type == 'cuda' else 'gloo'  # what the host knows, no GPU waits for
        dist.init_process_group(backend, timeout=TIMEOUT, rank=number,
                                world_size=count, store=unwritten_store(store, number, count))
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', stream=sys.stdout, force=True,
                        level=logging.WARNING)
    logger.setLevel(logging.INFO if is_main() else logging.WARNING)
    return chosen


def unwritten_store(store: dist.Store, number: int, count: int) -> dist.Store:
    """A part of torchrun's store that no earlier attempt has written to, agreed on by all processes.

    torchrun keeps its store when it restarts the processes, and with it the addresses of the dead ones, to which the
    new ones would try to connect. So each process says a word that is new, the first one repeats what it heard beside
    the name of the new part, and whoever finds its own word there answers with that name.
    """
    word = uuid.uuid4().hex
    if number:
        store.set(f'hello {number}', word)
        said: dict = {'heard': {}}
        while said['heard'].get(str(number)) != word:
            time.sleep(0.01)
            said = json.loads(store.get('round'))  # waits for the first one
        store.set(f'answer {number}', said['name'])
        return dist.PrefixStore(said['name'], store)
    silent = set(range(1, count))
    while silent:
        heard = {i: store.get(f'hello {i}').decode() for i in range(1, count) if store.check([f'hello {i}'])}
        store.set('round', json.dumps({'name': word, 'heard': heard}))
        silent -= {i for i in silent if store.check([f'answer {i}']) and store.get(f'answer {i}').decode() == word}
        time.sleep(0.01)
    return dist.PrefixStore(word, store)


def choose_device(name: str) -> torch.device:
    """'auto' is cuda, else mps, else cpu.

    Raises:
        ValueError: no such device on this machine.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps') from None
    if device.type == 'cuda' and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f'device {name!r} is not there: this machine has {torch.cuda.device_count()} GPUs')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise ValueError('device "mps" is not there: use --device cpu')
    return device


@torch.no_grad()
def all_gather(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] of every process -> [W * B, ...] in rank order, without gradient; identity on one process."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)  # every process's loss depends on these rows; DDP then averages over processes
        return grad.chunk(world_size())[rank()]


def all_gather_grad(x: torch.Tensor) -> torch.Tensor:
    """`all_gather` through which gradients flow back to the process that owns each row."""
    return _GatherWithGrad.apply(x) if world_size() > 1 else x


def gather_objects(item) -> list:
    """The picklable `item` of every process, in rank order, on every process."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def any_process(flag: bool, device: torch.device) -> bool:
    """True on every process when it is true on any."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def seed_everything(*parts: int) -> None:
    """Seed python, numpy and torch from a tuple of integers.

    Training seeds every step by (seed, step, rank): a resumed run draws what the uninterrupted run drew.
    """
    state = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(state)


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that the loop can save at a step boundary; a second one kills."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = True


# ---------------------------------------------------------------- files

@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = 'w'):
    """Open a temporary file that replaces `path` when the block ends well: whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp{os.getpid()}')
    try:
        with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_output_dir(path: str | os.PathLike) -> Path:
    """Create a folder and prove that it can be written.

    Raises:
        PermissionError: naming the folder and the remedy.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise PermissionError(f'cannot write to the output folder {path}: {error.strerror}. '
                              f'Choose another with --output_dir.') from None
    return path


def progress(iterable, total: int | None = None, desc: str = ''):
    """A progress bar with ETA on the main process; silent elsewhere."""
    return tqdm(iterable, total=total, desc=desc, disable=not is_main(), mininterval=1.0, leave=False,
                dynamic_ncols=True)
