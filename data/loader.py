"""Batches: the same global batches whatever the number of processes, resumable at any step."""

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.datasets import Captioned


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
        return self.steps - self.start

    def __iter__(self):
        for step in range(self.start, self.steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield self.order[first:first + self.batch_size].tolist()


def collate(items: list[dict]) -> dict:
    """-> image [B, 3, S, S], caption (list), id int64 [B], bad (list of (path, reason))"""
    return {'image': torch.stack([item['image'] for item in items]),
            'caption': [item['caption'] for item in items],
            'id': torch.tensor([item['id'] for item in items]),
            'bad': [pair for item in items for pair in item['bad']]}


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def make_loader(dataset: Captioned, batch_size: int, *, seed: int, epoch: int, start_step: int, workers: int,
                rank: int, world_size: int) -> DataLoader:
    """The training batches of an epoch from `start_step` on.

    Raises:
        ValueError: fewer samples than one global batch.
    """
    if len(dataset) < batch_size * world_size:
        raise ValueError(f'{len(dataset)} training samples are less than one batch of {batch_size} x {world_size} '
                         f'processes: lower train.batch_size')
    dataset.epoch = epoch
    return DataLoader(dataset, batch_sampler=Batches(len(dataset), batch_size, seed, epoch, start_step, rank, world_size),
                      num_workers=workers, collate_fn=collate, worker_init_fn=one_thread,
                      pin_memory=torch.cuda.is_available())


class BadImages:
    """Counts the broken pictures of a run, names each once in the log, and stops when there are too many.

    Args:
        max_share: of the pictures met, after the first 200.
    """

    def __init__(self, max_share: float, logger):
        self.max_share, self.logger = max_share, logger
        self.met, self.bad = 0, {}

    def update(self, batch: dict) -> None:
        """Raises:
            ValueError: too many broken pictures; names the share and the first of them.
        """
        self.met += len(batch['caption']) + len(batch['bad'])
        for path, reason in batch['bad']:
            if path not in self.bad:
                self.bad[path] = reason
                self.logger.warning('broken picture skipped: %s', reason)
        if self.met >= 200 and len(self.bad) > self.max_share * self.met:
            raise ValueError(f'{len(self.bad)} of {self.met} pictures cannot be read, more than data.max_bad_share '
                             f'{self.max_share}; the first: {"; ".join(list(self.bad.values())[:3])}')
