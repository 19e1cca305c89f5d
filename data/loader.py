"""Batches: the same global batches whatever the number of processes, resumable at any batch."""

import errno
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info

from data.datasets import Captioned
from data.distributed import gather_objects, local_world_size
from data.shards import ShardDataset, ShardStream
from data.target_store import WithTargets, pad_targets
from utils import WORKERS, as_worker

SHARED_MEMORY = Path('/dev/shm')  # where Linux keeps the tensors that processes share
PREFETCH = 2  # batches that each worker makes ahead
PATIENCE = 1800  # seconds after which a batch is given up
REMEDY = ('give it more (in a container: docker run --shm-size={size}, or --ipc=host), or set '
          'data.num_workers={workers}; '
          '0 loads in the main process')


class DistributedBatchSampler:
    """Batch sampler: global batch k of an epoch is rows [k * B * W, (k + 1) * B * W) of a permutation by (seed, epoch).

    Rank r takes the r-th part of each, so that one process with batch 2B sees what two with batch B see. The last
    incomplete batch is dropped.
    """

    def __init__(self, length: int, batch_size: int, seed: int, epoch: int, start_batch: int, rank: int,
                 world_size: int):
        self.order = np.random.default_rng((seed, epoch)).permutation(length)
        self.batch_size, self.rank, self.start = batch_size, rank, start_batch
        self.world_size, self.batches = world_size, length // (batch_size * world_size)

    def __len__(self) -> int:
        return max(0, self.batches - self.start)

    def __iter__(self):
        for batch in range(self.start, self.batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield self.order[first:first + self.batch_size].tolist()


def collate(items: list[dict]) -> dict:
    """-> image uint8 [B, 3, S, S], caption (list), id int64 [B], bad (list of (path, kind, message)), and the stored
    targets if there are any"""
    stored = {'targets': pad_targets([item['targets'] for item in items])} if 'targets' in items[0] else {}
    return {'image': torch.stack([item['image'] for item in items]),
            'caption': [item['caption'] for item in items],
            'id': torch.tensor([item['id'] for item in items]),
            'bad': [broken for item in items for broken in item['bad']], **stored}


class Room(NamedTuple):
    """Bytes of shared memory."""

    total: int
    free: int

    @classmethod
    def now(cls) -> 'Room | None':
        """None on a system that does not keep it in a folder."""
        if not SHARED_MEMORY.is_dir():
            return None
        usage = shutil.disk_usage(SHARED_MEMORY)  # itself it cannot be pickled
        return cls(usage.total, usage.free)


class InSharedMemory:
    """A collate function that puts batches into shared memory before a worker process hands them over.

    The queue between the processes would move them there too. But it drops a batch for which there is no room, and
    training would wait for that batch for ever.

    Raises:
        ValueError: shared memory cannot hold the batches that all workers of this machine make ahead.
        OSError: it is full, as something else takes it.
    """

    def __init__(self, collate_fn: Callable):
        self.collate_fn, self.checked, self.processes = collate_fn, False, local_world_size()
        self.room = Room.now()  # without our own workers'

    def __call__(self, items: list):
        worker = get_worker_info()
        if worker is None:
            return self.collate_fn(items)
        try:
            batch = self.collate_fn(items)  # torch's own allocates shared memory
            if self.room is not None and not self.checked:
                self.check(sum(tensor.nbytes for tensor in tensors_of(batch)), worker.num_workers)
            for tensor in tensors_of(batch):
                tensor.share_memory_()
        except RuntimeError as error:
            if 'No space left' not in str(error):
                raise
            raise full(self.room, worker.num_workers) from None
        return batch

    def check(self, size: int, workers: int) -> None:
        """Compare what the workers of all processes make ahead, batches of `size` bytes, with what there is."""
        own = PREFETCH * size * workers
        room = min(self.room.free, self.room.total // self.processes)
        if own > room:
            raise ValueError(
                f'{SHARED_MEMORY} is too small: {self.processes} processes x {workers} workers x {PREFETCH} batches of '
                f'{mib(size)} need {mib(own * self.processes)}; it has {mib(self.room.total)}, of which '
                f'{mib(self.room.free)} are free: ' +
                REMEDY.format(size=f'{math.ceil(1.25 * own * self.processes / 2 ** 30)}g',
                              workers=room // (PREFETCH * size)))
        self.checked = True


def mib(size: int) -> str:
    return f'{math.ceil(size / 2 ** 20)} MiB'


def full(room: Room, workers: int) -> OSError:
    """Args: room: what there was without our own workers'."""
    return OSError(f'{SHARED_MEMORY} is full, which the processes that load images need (it has {mib(room.total)}, of '
                   f'which {mib(room.free)} were free before): ' + REMEDY.format(size='4g', workers=workers // 2))


def tensors_of(batch) -> Iterator[torch.Tensor]:
    """The tensors with elements in a batch of dicts and lists."""
    if isinstance(batch, torch.Tensor) and batch.numel():
        yield batch
    elif isinstance(batch, dict | list | tuple):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from tensors_of(part)


class Loader(DataLoader):
    """A DataLoader that names shared memory as what is full where its processes cannot even start.

    Raises:
        OSError: from `iter`.
    """

    def __iter__(self):
        room = Room.now() if self.num_workers else None
        if room is not None:
            try:
                tuple(WORKERS.Lock() for _ in range(8 * (self.num_workers + 1)))  # torch's queues take fewer
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise full(room, self.num_workers) from None
        return super().__iter__()


def load(dataset, workers: int, collate_fn: Callable = default_collate, **options) -> DataLoader:
    """A DataLoader whose `workers` processes end with this one, and which says so if they lack shared memory."""
    return Loader(dataset, num_workers=workers, collate_fn=InSharedMemory(collate_fn), worker_init_fn=as_worker,
                      timeout=PATIENCE if workers else 0, multiprocessing_context=WORKERS if workers else None,
                      **options)


def make_loader(dataset: Captioned | WithTargets | ShardDataset, batch_size: int, *, seed: int, epoch: int,
                start_batch: int, workers: int, rank: int, world_size: int) -> DataLoader:
    """The training batches of an epoch from `start_batch` on; earlier ones are not read.

    The worker processes start with the iteration and take the dataset's epoch from here, so iterate a loader before
    the next one is made.

    Raises:
        ValueError: fewer samples than one global batch.
    """
    batches = len(dataset) // (batch_size * world_size)
    if not batches:
        raise ValueError(f'{len(dataset)} training samples are less than one batch of {batch_size} x {world_size} '
                         f'processes: lower train.batch_size')
    options = {'workers': workers, 'collate_fn': collate, 'pin_memory': torch.cuda.is_available()}
    dataset.epoch = epoch
    if isinstance(dataset, ShardDataset):
        stream = ShardStream(dataset, batch_size, batches, start_batch, rank)
        return load(stream, batch_size=batch_size, **options)
    sampler = DistributedBatchSampler(len(dataset), batch_size, seed, epoch, start_batch, rank, world_size)
    return load(dataset, batch_sampler=sampler, **options)


class BadImages:
    """Counts the broken images of a run by kind, logs each once, and stops the run when there are too many.

    Args:
        max_share: of the images read, once they are 200.
    """

    def __init__(self, max_share: float, logger):
        self.max_share, self.logger = max_share, logger
        self.met = 0  # images asked for by this process
        self.kinds: Counter[str] = Counter()  # of those that were broken
        self.named: dict[str, str] = {}

    def update(self, batch: dict) -> None:
        self.met += len(batch['caption']) + len(batch['bad'])
        for path, kind, message in batch['bad']:
            self.kinds[kind] += 1
            if path not in self.named:
                self.named[path] = message
                self.logger.warning('broken image skipped (%s): %s', kind, message)

    def check(self) -> str:
        """What all processes met, in words; they call it together, so that none goes on without the others.

        Raises:
            ValueError: too many broken images, on every process; names the share, the kinds and the first of them.
        """
        parts = gather_objects((self.met, self.kinds, list(self.named.values())[:3]))
        met, kinds = sum(part[0] for part in parts), sum((part[1] for part in parts), Counter())
        count = kinds.total()
        shown = f'{count} of {met} images' + (
            f' ({", ".join(f"{number} {kind}" for kind, number in kinds.most_common())})' if count else '')
        if met >= 200 and count > self.max_share * met:
            first = [message for part in parts for message in part[2]][:3]
            raise ValueError(f'{shown} cannot be read: {count / met:.1%}, more than data.max_bad_fraction '
                             f'{self.max_share}; the first: {"; ".join(first)}')
        return shown
