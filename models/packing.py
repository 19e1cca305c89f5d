"""Texts without their pads, for training: where their tokens are, the host knows, so that no device is waited for."""

from typing import NamedTuple

import torch

from utils import to_device


class Packed(NamedTuple):
    """The mask [R, T] of right-padded texts, and the place of each of their tokens among R * T [M].

    Given in the place of a mask, what treats every token on its own (all products but those of attention) leaves the
    pads out. States come back padded with zeros.
    """

    mask: torch.Tensor
    rows: torch.Tensor


def packed(mask: torch.Tensor, lengths: list[int]) -> Packed:
    """mask [R, T] of texts of these lengths, which the host knows: nothing waits for the device."""
    rows = [row * mask.shape[1] + place for row, length in enumerate(lengths) for place in range(length)]
    return Packed(mask, to_device(torch.tensor(rows), mask.device))


def pack(x: torch.Tensor, texts: Packed | None) -> torch.Tensor:
    """[R, T, width] -> [M, width]"""
    return x if texts is None else x.flatten(0, 1)[texts.rows]


def pad(x: torch.Tensor, texts: Packed | None) -> torch.Tensor:
    """[M, width] -> [R, T, width]"""
    if texts is None:
        return x
    return x.new_zeros(texts.mask.numel(), x.shape[1]).index_copy(0, texts.rows, x).unflatten(0, texts.mask.shape)
