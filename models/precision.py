"""The precisions that a net can be served in."""

import copy

import torch

from models.blip import BLIP

PRECISIONS = ('fp32', 'bf16')


def at_precision(model: BLIP, precision: str) -> BLIP:
    """A net for inference at a precision; 'fp32' is the net itself, 'bf16' a copy with all weights and activations in
    bfloat16 (fast on GPUs since Ampere and on CPUs with AVX-512 or AMX). Features and logits come in float32 from both.

    Raises:
        ValueError: no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'unknown precision {precision!r}: choose one of {", ".join(PRECISIONS)}')
    return model if precision == 'fp32' else copy.deepcopy(model).to(torch.bfloat16)
