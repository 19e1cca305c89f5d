"""What a training step is made of: the micro-batches of an update, and what they share."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from models.distill.teacher import LiveTargets, StoredTargets


class MicroBatch(NamedTuple):
    """images [B, 3, S, S]; ids, mask [B, T], right-padded; sample_ids [B]; with a stored teacher, its answers.

    `lengths` are the tokens of each text on the host; None: they are read from the mask, for which a GPU is waited for.
    """

    images: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    sample_ids: torch.Tensor
    lengths: list[int] | None = None
    stored: dict[str, torch.Tensor] | None = None


@dataclass
class Update:
    """What the micro-batches of one optimizer step share, computed before all of them and without gradient.

    Rows N = micro-batches x processes x B, in the order that one batch of them all would have: so large a batch, more
    processes or more micro-batches compare every row with the same columns.

    Attributes:
        targets: the teacher's, one for each micro-batch; None without a teacher.
        lengths: tokens of each text of a micro-batch, known to the host; nothing in the step waits for the device.
        widths: of each micro-batch, the most tokens of a text on any process.
        ids: [N]
        columns: by name of the queue, unit-norm features [N + queue, E], the update's followed by the queue's.
        column_ids: [N + queue]
        tokens, labels: mean count of tokens in a micro-batch, and of those that carry an LM loss.
    """

    targets: list[LiveTargets | StoredTargets | None]
    lengths: list[list[int]]
    widths: list[int]
    ids: torch.Tensor
    columns: dict[str, torch.Tensor]
    column_ids: torch.Tensor | None
    tokens: torch.Tensor
    labels: torch.Tensor


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
    """Tokens of this micro-batch over the mean of all of the update's: turns a mean over its own tokens into its part
    of the mean over all of them, which the average of gradients over micro-batches and processes then is.
    """
    return mask.sum() / mean.clamp(min=1)


def pad_to(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Right-pad [B, T] with zeros ([PAD] in ids, masked in masks) to [B, width]."""
    return F.pad(rows, (0, width - rows.shape[1]))
