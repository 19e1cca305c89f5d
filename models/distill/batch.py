"""What a training step computes with: its batches, and what they share."""

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
        number: place among the batches of its update. This and what follows is filled in by `Objective.prepare`.
        width: most tokens of a text on any process.
        targets: what the teacher says of it; None without a teacher.
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
    """What the batches of one optimizer step share, computed before all of them and without gradient.

    Rows N = batches x processes x B, in the order that one batch of them all would have: so large a batch, more
    processes or more accumulated batches compare every row with the same columns.

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
    """What the data loader gives, tokenized and on the device.

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

    Each row is a function of its number and the seed: a process draws its own rows alone, and those that it would have
    on any number of processes.
    """
    blocks = -(-width // 8)  # a step of the counter gives eight numbers
    generator = np.random.Generator(np.random.Philox(key=seed, counter=first * blocks))
    noise = generator.random((count, 8 * blocks), dtype=np.float32)[:, :width]
    return torch.from_numpy(noise).clamp_(1e-9, 1 - 1e-7)


def token_share(mask: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Tokens of this batch over the mean of all of the update's: turns a mean over its own tokens into its part of the
    mean over all of them, which the average of gradients over batches and processes then is."""
    return mask.sum() / mean.clamp(min=1)


def pad_to(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Right-pad [B, T] with zeros ([PAD] in ids, masked in masks) to [B, width]."""
    return F.pad(rows, (0, width - rows.shape[1]))
