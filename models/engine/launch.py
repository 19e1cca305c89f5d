"""How a process was launched: its rank, its device, and the parent whose death ends it."""

import itertools
import json
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from data.distributed import is_main
from utils import end_with_parent, logger

TIMEOUT = timedelta(minutes=60)  # of what one process waits for another: evaluation may keep one busy
MEETING = timedelta(minutes=10)  # within which all processes of a run must have started
SPECIAL_STEPS = 0xfffffff0  # SLURM's step numbers from here on are batch scripts and interactive shells


class Place(NamedTuple):
    """A process among those of a run.

    Attributes:
        rank, size: its number among all processes, and how many there are.
        local_rank, local_size: the same among the processes on its machine.
        address: HOST:PORT of the first process, where they meet.
        by: 'torchrun' or 'srun'.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    by: str

    def variables(self) -> dict[str, str]:
        """What torchrun sets in the environment of its processes."""
        host, _, port = self.address.rpartition(':')
        return {'RANK': str(self.rank), 'WORLD_SIZE': str(self.size), 'LOCAL_RANK': str(self.local_rank),
                'LOCAL_WORLD_SIZE': str(self.local_size), 'MASTER_ADDR': host, 'MASTER_PORT': port}


def place(env: Mapping[str, str] = os.environ) -> Place | None:
    """What torchrun's variables say, else SLURM's; None for a process on its own.

    Raises:
        ValueError: a variable is not the number that it should be.
    """
    if 'RANK' in env:  # also within a job of SLURM
        address = f'{env.get("MASTER_ADDR")}:{env.get("MASTER_PORT")}'
        return Place(number(env, 'RANK', 0), number(env, 'WORLD_SIZE', 1), number(env, 'LOCAL_RANK', 0),
                     number(env, 'LOCAL_WORLD_SIZE', 1), address, 'torchrun')
    return slurm_place(env)


def slurm_place(env: Mapping[str, str]) -> Place | None:
    """The place of a task that `srun` started.

    The shell of `salloc` or `srun --pty` and the script of `sbatch` have the variables of the whole job, but what runs
    there without `srun` is one process.
    """
    step = env.get('SLURM_STEP_ID') or env.get('SLURM_STEPID') or ''
    if not step.isdigit() or int(step) >= SPECIAL_STEPS or 'SLURM_PTY_PORT' in env:
        return None
    size = number(env, 'SLURM_STEP_NUM_TASKS', number(env, 'SLURM_NTASKS', 1))
    if size == 1:
        return None
    nodes = hosts(env.get('SLURM_STEP_NODELIST') or env.get('SLURM_JOB_NODELIST') or env.get('SLURM_NODELIST') or '')
    alone = len(nodes) < 2
    host = env.get('MASTER_ADDR') or ('localhost' if alone else nodes[0])
    # Below the ports that the system hands out itself, and another one for every step of every job.
    port = number(env, 'MASTER_PORT', 12000 + (97 * number(env, 'SLURM_JOB_ID', 0) + int(step)) % 20000)
    tasks = counts(env.get('SLURM_STEP_TASKS_PER_NODE') or env.get('SLURM_TASKS_PER_NODE') or '')
    node = number(env, 'SLURM_NODEID', 0)
    local_size = (size if alone else tasks[node] if node < len(tasks) else
                  number(env, 'SLURM_NTASKS_PER_NODE', -(-size // len(nodes))))
    return Place(number(env, 'SLURM_PROCID', 0), size, number(env, 'SLURM_LOCALID', 0), local_size, f'{host}:{port}',
                 'srun')


def number(env: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(env.get(name) or default)
    except ValueError:
        raise ValueError(f'the environment variable {name} is {env[name]!r}: it must be a number') from None


def hosts(names: str) -> list[str]:
    """SLURM's list of nodes: 'gpu[001-003,007],cpu12' is gpu001, gpu002, gpu003, gpu007 and cpu12.

    Raises:
        ValueError: it is no such list.
    """
    if not re.fullmatch(r'([^][,]|\[\d+(-\d+)?(,\d+(-\d+)?)*\]|,)*', names):
        raise ValueError(f'cannot read the list of nodes {names[:80]!r} that SLURM set: launch with torchrun instead')
    found = []
    for name in re.findall(r'(?:[^][,]|\[.*?\])+', names):
        parts = re.split(r'\[(.*?)\]', name)  # every second one was in brackets
        found += map(''.join, itertools.product(*(numbers(part) if i % 2 else [part] for i, part in enumerate(parts))))
    return found


def numbers(ranges: str) -> list[str]:
    """'001-003,007' -> 001, 002, 003, 007"""
    found = []
    for part in ranges.split(','):
        first, _, last = part.partition('-')
        found += [f'{i:0{len(first)}d}' for i in range(int(first), int(last or first) + 1)]
    return found


def counts(tasks: str) -> list[int]:
    """SLURM's tasks on each node: '4(x2),3' is 4, 4 and 3."""
    return [int(count) for count, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', tasks) for _ in range(int(times or 1))]


def setup_process(device: str = 'auto') -> torch.device:
    """Join the process group when launched by torchrun or srun; choose the device; set up logging.

    Raises:
        ValueError: the device is absent, there are more processes than GPUs on this machine, or the processes do not
            find each other.
    """
    # Texts of other lengths in every step would leave GPU memory in pieces. Read when the first tensor is made there.
    if 'PYTORCH_CUDA_ALLOC_CONF' not in os.environ:
        os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')
    end_with_torchrun()
    here, chosen = place(), choose_device(device)
    if here is not None and here.by == 'srun':
        os.environ |= here.variables()
    if chosen.type == 'cuda':
        if here is not None or chosen.index is None:
            chosen = torch.device('cuda', own_gpu(here, torch.cuda.device_count()) if here else 0)
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # oneDNN keeps a kernel for each shape. As texts are not padded, every training step brings new ones, and the 1024
    # that it keeps by default are a third of a gigabyte that is never used again.
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '128')
    if here is not None and not dist.is_initialized():
        try:
            store, number, count = next(dist.rendezvous('env://', timeout=MEETING))
        except dist.DistError as error:
            raise ValueError(f'process {here.rank} of {here.size} did not find the others at {here.address} '
                             f'({str(error).splitlines()[0][:120]}): set MASTER_ADDR to the first node and MASTER_PORT '
                             f'to a free port, the same for all') from None
        store.set_timeout(TIMEOUT)
        backend = 'cpu:gloo,cuda:nccl' if chosen.type == 'cuda' else 'gloo'  # what the host knows, no GPU waits for
        dist.init_process_group(backend, timeout=TIMEOUT, rank=number,
                                world_size=count, store=unwritten_store(store, number, count))
    if hasattr(sys.stdout, 'reconfigure'):  # no notebook's
        sys.stdout.reconfigure(errors='backslashreplace')  # as stderr: a name that is no text must not end a run
    logging.raiseExceptions = False  # whoever reads stdout may have gone; that ends no run, and takes no traceback
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', stream=sys.stdout, force=True,
                        level=logging.WARNING)
    logger.setLevel(logging.INFO if is_main() else logging.WARNING)
    return chosen


def unwritten_store(store: dist.Store, number: int, count: int) -> dist.Store:
    """A part of the store that no earlier attempt has written to, agreed on by all processes.

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


# ---------------------------------------------------------------- devices

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
    if device is None or device.type not in ('cpu', 'cuda', 'mps') or device.type != 'cuda' and device.index:
        raise ValueError(f'unknown device {str(name)[:40]!r}: use auto, cpu, cuda, cuda:N or mps')
    if device.type == 'cuda' and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f'device {str(name)!r} is not there: this machine has {torch.cuda.device_count()} GPUs')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise ValueError('device "mps" is not there: use --device cpu')
    return device


def own_gpu(here: Place, count: int) -> int:
    """The number of this process's GPU among the `count` that it sees; srun --gpus-per-task shows each only its own."""
    if here.by == 'srun' and count == 1:
        return 0
    if here.local_size > count:
        raise ValueError(f'{here.local_size} processes were launched on this machine, which has {count} GPUs: launch '
                         f'fewer (--nproc_per_node), or train on the CPU with --device cpu')
    return here.local_rank


# ---------------------------------------------------------------- ends

def end_with_torchrun() -> None:
    """Let the kernel kill this process when the torchrun that started it is killed (on Linux).

    Raises:
        ValueError: torchrun has ended already.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ or not end_with_parent():
        return
    if os.getsid(0) == os.getpid():  # torchrun began a session for it, so nothing stands between them
        try:
            program = os.readlink(f'/proc/{os.getppid()}/exe')
        except OSError:  # another user's
            return
        if 'python' not in os.path.basename(program):  # the foster parent of orphans
            raise ValueError('torchrun, which started this process, has ended')
