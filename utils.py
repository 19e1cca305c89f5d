"""Mechanics shared by the scripts: errors, processes, atomic files, progress bars."""

import json
import logging
import os
import random
import re
import reprlib
import secrets
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
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
TIMEOUT = timedelta(minutes=60)  # of what one process waits for another: evaluation may keep one busy
logger = logging.getLogger('dlip')


# ---------------------------------------------------------------- errors

class _Short(reprlib.Repr):
    def repr_int(self, x, level):  # Python refuses to print integers of thousands of digits
        return repr(x) if abs(x) < 10 ** self.maxlong else f'an integer of {x.bit_length()} bits'


def shorten(value, limit: int | None = None) -> str:
    """How a message quotes what it was given: one line of bounded length, whatever the value's length, depth or cycles.

    A path or an error is quoted as its text (400 characters unless `limit` says otherwise), anything else as its repr
    (80 characters).
    """
    if isinstance(value, os.PathLike | Exception):
        text, limit = str(value), limit or 400
    else:
        limit, short = limit or 80, _Short()
        short.maxlevel, short.maxstring, short.maxother = 3, limit, limit
        text = short.repr(value)
    text = re.sub(r'[\x00-\x1f\x7f\x85\u2028\u2029]+', ' ', text).strip()
    kept = (limit - 3) // 2
    return text if len(text) <= limit else f'{text[:limit - 3 - kept]}...{text[-kept:]}'


@contextmanager
def clean_exit():
    """Turn an expected failure (bad input) into one line on stderr and exit code 1, without a traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        if os.environ.get('DLIP_TRACEBACK'):
            raise
        if 'Original Traceback' in str(error):  # of a loader's process: its last line is the error
            error = ValueError(str(error).strip().splitlines()[-1].partition(': ')[2])
        sys.exit(f'error: {shorten(error, 1000)}')


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
    if hasattr(sys.stdout, 'reconfigure'):  # no notebook's
        sys.stdout.reconfigure(errors='backslashreplace')  # as stderr: a name that is no text must not end a run
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
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ('cpu', 'cuda', 'mps'):
        raise ValueError(f'unknown device {shorten(name)}: use auto, cpu, cuda, cuda:N or mps')
    if device.type == 'cuda' and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f'device {shorten(name)} is not there: this machine has {torch.cuda.device_count()} GPUs')
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
    temporary = path.with_name(f'{path.name}.tmp{secrets.token_hex(6)}')
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


def shown(name: str | os.PathLike) -> str:
    """A file name as one line of text that any stdout can print: as it is, or as a JSON string, from which
    `json.loads` gives the name back, where it holds line breaks, control characters or bytes that are no text."""
    name = os.fspath(name)
    try:
        name.encode(sys.stdout.encoding or 'utf-8')
        return name if name.isprintable() else json.dumps(name)
    except UnicodeEncodeError:
        return json.dumps(name)


def progress(iterable, total: int | None = None, desc: str = ''):
    """A progress bar with ETA on the main process; silent elsewhere."""
    return tqdm(iterable, total=total, desc=desc, disable=not is_main(), mininterval=1.0, leave=False,
                dynamic_ncols=True)
