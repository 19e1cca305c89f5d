"""The processes of a run: their number and place, what they tell each other, and their random numbers."""

import os
import random
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

_alone = False


@contextmanager
def alone():
    """Within it this process counts as the only one: world size 1, nothing is gathered."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def local_rank() -> int:
    """The number of this process among those of its run on this machine."""
    return int(os.environ.get('LOCAL_RANK', 0)) if dist.is_initialized() else 0


def local_world_size() -> int:
    """How many processes of this run are on this machine."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1)) if dist.is_initialized() else 1


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


def any_process(flag: bool) -> bool:
    """True on every process when it is true on any; the hosts exchange it, no GPU is waited for."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def to_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`x` of the host on a device; a GPU copies it from pinned memory, while the host goes on."""
    return (x.pin_memory() if torch.device(device).type == 'cuda' else x).to(device, non_blocking=True)


def seed_everything(*parts: int) -> None:
    """Seed python, numpy and torch from a tuple of integers.

    Training seeds every step by (seed, batch, rank), so that a resumed run draws what the uninterrupted run drew.
    """
    state = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(state)


def progress(iterable, total: int | None = None, desc: str = ''):
    """A progress bar with ETA on the main process; silent elsewhere."""
    return tqdm(iterable, total=total, desc=desc, disable=not is_main(), mininterval=1.0, leave=False,
                dynamic_ncols=True)
