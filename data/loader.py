"""Batches: the same global batches whatever the number of processes, resumable at any step."""

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.datasets import Captioned
from data.target_store import WithTargets, pad_targets


class Batches:
    """Batch sampler: global batch k of an epoch is rows [k * B * W, (k + 1) * B * W) of a permutation by (seed, epoch).

    Rank r takes the r-th part of each, so that one process with batch 2B sees what two with batch B see. The last
    incomplete batch is dropped.
    """

    def __init__(self, length: int, batch_size: int, seed: int, epoch: int, start_step: int, rank: int,
                 world_size: int):
        self.order = np.random.default_rng((seed, epoch)).permutation(length)
        self.batch_size, self.rank, self.start = batch_size, rank, start_step
        self.world_size, self.steps = world_size, length // (batch_size * world_size)

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self):
        for step in range(self.start, self.steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield self.order[first:first + self.batch_size].tolist()


def collate(items: list[dict]) -> dict:
    """-> image [B, 3, S, S], caption (list), id int64 [B], bad (list of (path, reason)), stored targets if there are"""
    stored = {'targets': pad_targets([item['targets'] for item in items])} if 'targets' in items[0] else {}
    return {'image': torch.stack([item['image'] for item in items]),
            'caption': [item['caption'] for item in items],
            'id': torch.tensor([item['id'] for item in items]),
            'bad': [pair for item in items for pair in item['bad']], **stored}


def make_loader(dataset: Captioned | WithTargets, batch_size: int, *, seed: int, epoch: int, start_step: int,
                workers: int, rank: int, world_size: int) -> DataLoader:
    """The training batches of an epoch from `start_step` on: what was seen before is not read again.

    The worker processes start with the iteration and take the dataset's epoch from here, so iterate a loader before
    the next one is made.

    Raises:
        ValueError: fewer samples than one global batch.
    """
    if len(dataset) < batch_size * world_size:
        raise ValueError(f'{len(dataset)} training samples are less than one batch of {batch_size} x {world_size} '
                         f'processes: lower train.batch_size')
    dataset.epoch = epoch
    batches = Batches(len(dataset), batch_size, seed, epoch, start_step, rank, world_size)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.cuda.is_available())


class BadImages:
    """Counts the broken pictures of a run, names each once in the log, and stops when there are too many.

    Args:
        max_share: of the pictures met, once they are 200.
    """

    def __init__(self, max_share: float, logger):
        self.max_share, self.logger = max_share, logger
        self.met = self.count = 0  # pictures asked for, and how many of them were broken
        self.reasons: dict[str, str] = {}

    def update(self, batch: dict) -> None:
        """Raises:
            ValueError: too many broken pictures; names the share and the first of them.
        """
        self.met += len(batch['caption']) + len(batch['bad'])
        self.count += len(batch['bad'])
        for path, reason in batch['bad']:
            if path not in self.reasons:
                self.reasons[path] = reason
                self.logger.warning('broken picture skipped: %s', reason)
        if self.met >= 200 and self.count > self.max_share * self.met:
            raise ValueError(f'{self.count} of {self.met} pictures ({self.count / self.met:.1%}) cannot be read, more '
                             f'than data.max_bad_share {self.max_share}; the first: '
                             f'{"; ".join(list(self.reasons.values())[:3])}')
