"""The inputs of a training step: its batches, and the features that they share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data.distributed import to_device
from data.transforms import normalise
from models.distill.teacher import LiveTargets, StoredTargets
from models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """A batch on the device: images [B, 3, S, S]; ids, mask [B, T], right-padded; sample_ids [B].

    Attributes:
        lengths: tokens of each text, known to the host, so that nothing in the step waits for the device.
        stored: the answers of a stored teacher (models/distill/teacher_cache.py).
        number: index among the batches of its update. `Objective.prepare` fills in this and the next two.
        width: most tokens of a text on any process.
        targets: the teacher's answers; None without a teacher.
    """

    images: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    sample_ids: torch.Tensor
    lengths: list[int]
    stored: dict[str, torch.Tensor] | None = None
    number: int = 0
    width: int = 0
    targets: LiveTargets | StoredTargets | None = None


@dataclass(frozen=True)
class Update:
    """Features of all batches of an optimizer step, computed before its first forward pass, without gradient.

    N = batches x processes x B rows, in the order of one batch of that size: every row is compared with the same
    columns however a batch is split over processes and accumulation.

    Attributes:
        ids: [N]
        columns: by name of the queue, unit-norm features [N + queue, E], the update's followed by the queue's.
        column_ids: [N + queue]
        tokens, labels: mean count of tokens in a batch, and of those that carry an LM loss.
        alpha: share of the momentum targets.
        seed: of the hard negatives.
    """

    ids: torch.Tensor
    columns: dict[str, torch.Tensor]
    column_ids: torch.Tensor | None
    tokens: torch.Tensor
    labels: torch.Tensor
    alpha: float
    seed: int

    def own(self) -> dict[str, torch.Tensor]:
        """The columns [N, E] of the update itself."""
        return {name: rows[:len(self.ids)] for name, rows in self.columns.items()}


def to_batch(loaded: dict, tokenizer: Tokenizer, max_tokens: int, device: torch.device, prompt: str = '') -> Batch:
    """A batch of the data loader, tokenized and on the device.

    Raises:
        ValueError: stored targets are of other captions.
    """
    ids, mask = tokenizer([prompt + caption for caption in loaded['caption']], max_tokens)
    lengths, stored = mask.sum(1), loaded.get('targets')
    if stored is not None:
        if not torch.equal(stored['tokens'], lengths):
            raise ValueError('the stored targets are of captions of other lengths: store them again')
        stored = {name: to_device(x, device) for name, x in stored.items()}
    images, *rest = (to_device(x, device) for x in (loaded['image'], ids, mask, loaded['id']))
    return Batch(normalise(images), *rest, lengths.tolist(), stored)


def with_start(ids: torch.Tensor, start_id: int) -> torch.Tensor:
    """The same texts with another start token at position 0."""
    ids = ids.clone()
    ids[:, 0] = start_id
    return ids


def row_noise(seed: int, first: int, count: int, width: int) -> torch.Tensor:
    """Uniform (0, 1) float32 [count, width] for the rows `first`, `first` + 1, ... of a global batch.

    Each row depends only on its number and the seed, so a process draws just its own rows, whatever the number of
    processes.
    """
    blocks = -(-width // 8)  # a step of the counter gives eight numbers
    generator = np.random.Generator(np.random.Philox(key=seed, counter=first * blocks))
    noise = generator.random((count, 8 * blocks), dtype=np.float32)[:, :width]
    return torch.from_numpy(noise).clamp_(1e-9, 1 - 1e-7)


def token_share(mask: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Tokens of this batch over the update's mean per batch. Scaled by it, means over each batch's own tokens average,
    over batches and processes, to the mean over all tokens."""
    return mask.sum() / mean.clamp(min=1)


def pad_to(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Right-pad [B, T] with zeros ([PAD] in ids, masked in masks) to [B, width]."""
    return F.pad(rows, (0, width - rows.shape[1]))
