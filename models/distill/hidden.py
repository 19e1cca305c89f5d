"""Hidden-state distillation: states of chosen layers against the teacher's, through learned projections."""

import torch
from torch import nn

from models import losses
from models.linear import Linear
from utils import shorten

STREAMS = {'vision_hidden': 'vision', 'text_hidden': 'text', 'fused_hidden': 'text', 'decoder_hidden': 'text'}
LayerPairs = list[tuple[int, int]]  # (student's, teacher's), both counted from 0


def layer_pairs(chosen: list | None, depth: int, teacher_depth: int, tower: str) -> LayerPairs:
    """Which layer of the student learns from which of the teacher.

    Args:
        chosen: layers of the student counted from 1, each matched by depth (layer i of n with the teacher's i N / n,
            so the last with the last), or pairs [student's, teacher's]; None: every layer of the student.
        tower: 'vision' or 'text', as in the config's `hidden_layers`.

    Raises:
        ValueError: no such layer, one that is named twice, or none at all.
    """
    name, pairs = f'hidden_layers.{tower}', []
    for entry in range(1, depth + 1) if chosen is None else chosen:
        if type(entry) is int:
            ours, theirs = entry, max(1, round(entry * teacher_depth / depth))
        elif isinstance(entry, list) and list(map(type, entry)) == [int, int]:
            ours, theirs = entry
        else:
            raise ValueError(f'{name} holds {shorten(entry)}: give layers as in [4, 8, 12], or pairs as in [[6, 12]]')
        if not 1 <= ours <= depth:
            raise ValueError(f'{name}: the student has the layers 1 to {depth}, not {ours}')
        if not 1 <= theirs <= teacher_depth:
            raise ValueError(f'{name}: the teacher has the layers 1 to {teacher_depth}, not {theirs}')
        pairs.append((ours - 1, theirs - 1))
    if not pairs or len(dict(pairs)) < len(pairs):
        raise ValueError(f'{name} is {shorten(chosen)}: name at least one layer, and none of the student twice '
                         f'(null: all)')
    return pairs


def projection_name(ours: int, theirs: int) -> str:
    """Name of the projection from a layer of the student to one of the teacher, as the config counts them."""
    return f'{ours + 1}_{theirs + 1}'


class HiddenStates(nn.Module):
    """The hidden-state term of one pass (TinyBERT, Jiao et al. 2020, arXiv 1909.10351, equation 8).

    Each chosen layer is projected from the student's width to the teacher's, which is the common width. The teacher's
    side is not projected: two projections trained towards each other would meet at zero. Where the widths agree the
    projection starts as the identity, since layers inherited from the teacher already use its space.
    """

    def __init__(self, pairs: LayerPairs, width: int, teacher_width: int):
        super().__init__()
        self.pairs = pairs
        self.ours, self.theirs = map(sorted, map(set, zip(*pairs, strict=True)))  # layers to keep the states of
        self.recomputed = losses.recomputed
        self.projs = nn.ModuleDict({projection_name(*pair): Linear(width, teacher_width) for pair in pairs})
        if width == teacher_width:
            for linear in self.projs.values():
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, states: dict[int, torch.Tensor], teacher_states: dict[int, torch.Tensor],
                mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mean over the pairs of `losses.hidden_loss`; states by layer, [B, T, width] and [B, T, teacher_width]."""
        errors = (self.recomputed(losses.hidden_error, self.projs[projection_name(ours, theirs)](states[ours]),
                                  teacher_states[theirs]) for ours, theirs in self.pairs)
        values = [losses.masked_mean(error, mask) for error in errors]
        return sum(values) / len(values)
