"""The teacher's answers for a batch: computed while training (live), or read from a cache (stored)."""

from contextlib import nullcontext
from functools import cached_property, wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.distributed import all_gather
from data.target_store import LOWEST
from models.blip import BLIP, BLIPConfig, select_images, with_negatives
from models.linear import Unpadded


class Matched(NamedTuple):
    """Of the matching pass over R rows: [ENC]'s state [R, width], logits [R, 2], last-layer maps and the states of the
    teacher's layers that are compared (`TextOutput`).
    """

    hidden: torch.Tensor | None
    logits: torch.Tensor | None
    self_map: torch.Tensor | None = None
    cross_map: torch.Tensor | None = None
    states: dict[int, torch.Tensor] | None = None


class Decoded(NamedTuple):
    """Of the decoder's pass: states [B, T - 1, width] of all positions but the last, last-layer maps, and the states
    [B, T, width] of the teacher's layers that are compared.
    """

    hidden: torch.Tensor | None
    self_map: torch.Tensor | None = None
    cross_map: torch.Tensor | None = None
    states: dict[int, torch.Tensor] | None = None


def asked(method):
    """Decorates the methods of `LiveTargets` that run the teacher: no gradient, and no autocast where the teacher's own
    weights are not float32.
    """
    @wraps(method)
    def run(self, *args):
        exact = self.teacher.dtype == torch.float32
        with torch.no_grad(), nullcontext() if exact else torch.autocast(self.images.device.type, enabled=False):
            return method(self, *args)
    return run


class LiveTeacher:
    """A frozen teacher in eval mode, kept outside the module tree: neither the optimizer, nor DDP, nor a checkpoint
    sees it.

    Attributes:
        layers: by hidden-state term (models/distill/hidden.py) the layers whose states are compared.
    """

    def __init__(self, model: BLIP, layers: dict[str, list[int]] | None = None):
        self.model = model.eval().requires_grad_(False)
        self.layers = layers or {}

    @property
    def config(self) -> BLIPConfig:
        return self.model.config

    @property
    def temp(self) -> torch.Tensor:
        return self.model.temp

    def compute_in(self, dtype: torch.dtype) -> None:
        """Cast the weights to a precision once instead of in every step, all but the temperature."""
        temp = self.model.temp.detach().clone() if self.model.text_encoder is not None else None
        self.model.to(dtype)
        if temp is not None:
            self.model.temp.data = temp

    def targets(self, images: torch.Tensor, stored: None = None) -> 'LiveTargets':
        return LiveTargets(self.model, images, self.layers)


class LiveTargets:
    """A teacher's answers for one batch, computed on demand; image tokens and keys only once.

    Args:
        layers: see `LiveTeacher`.

    Attributes:
        text_states: {layer: [B, T, text_width]} of the text-only pass, once `features` was called.
    """

    def __init__(self, teacher: BLIP, images: torch.Tensor, layers: dict[str, list[int]] | None = None):
        self.teacher, self.images, self.layers = teacher, images, layers or {}
        self.text_states: dict[int, torch.Tensor] = {}

    @cached_property
    @asked
    def encoded(self) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        return self.teacher.encode_image(self.images, self.layers.get('vision_hidden', ()))

    @property
    def image_tokens(self) -> torch.Tensor:
        """[B, N, vision_width]"""
        return self.encoded[0]

    @property
    def image_states(self) -> dict[int, torch.Tensor]:
        """{layer: [B, N, vision_width]}"""
        return self.encoded[1]

    @cached_property
    @asked
    def image_kv(self):
        """Cross-attention keys and values of the images."""
        return self.teacher.project_image(self.image_tokens)

    @asked
    def features(self, ids: torch.Tensor, mask: torch.Tensor | Unpadded) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, mask [B, T] starting with [CLS] -> unit-norm image and text features [B, embed_dim]"""
        text, self.text_states = self.teacher.text_feat(ids, mask, self.layers.get('text_hidden', ()))
        return self.teacher.image_feat(self.image_tokens), text

    @asked
    def matching(self, ids: torch.Tensor, mask: torch.Tensor | Unpadded, negatives: torch.Tensor | None,
                 from_all: bool, want_maps: bool) -> Matched:
        """Texts starting with [ENC], [B, T] of the pairs, or [3 B, T], of which the second third meets other images.

        Args:
            negatives: those images' rows [B] in this batch, or (`from_all`) in that of all processes.
        """
        kv = self.image_kv
        if negatives is not None:
            others = self.teacher.project_image(all_gather(self.image_tokens)[negatives]) if from_all else \
                select_images(kv, negatives)
            kv = with_negatives(kv, others)
        fused = self.teacher.text_encoder(ids, mask, image_kv=kv, want_maps=want_maps, first_only=not want_maps,
                                          layers=self.layers.get('fused_hidden', ()))
        hidden = fused.hidden[:, 0]
        return Matched(hidden, self.teacher.itm_head(hidden), fused.self_map, fused.cross_map, fused.states)

    @asked
    def decoding(self, ids: torch.Tensor, mask: torch.Tensor | Unpadded, want_maps: bool) -> Decoded:
        """ids, mask [B, T] starting with [DEC]"""
        decoded = self.teacher.text_decoder.bert(ids, mask, causal=True, image_kv=self.image_kv, want_maps=want_maps,
                                                 layers=self.layers.get('decoder_hidden', ()))
        return Decoded(decoded.hidden[:, :-1], decoded.self_map, decoded.cross_map, decoded.states)

    @asked
    def next_tokens(self, decoded: Decoded, rows: torch.Tensor) -> tuple[torch.Tensor]:
        """What `losses.next_token_losses` takes: logits [M, V] at the positions `rows` [M] of B * (T - 1)."""
        return self.teacher.text_decoder.logits(decoded.hidden.flatten(0, 1)[rows]),


class StoredTeacher:
    """Architecture and temperature of a teacher whose answers are stored (models/distill/teacher_cache.py)."""

    def __init__(self, config: BLIPConfig, temp: float | None):
        self.config, self.temp = config, temp
        self.layers: dict[str, list[int]] = {}  # hidden states are not stored

    def targets(self, images: torch.Tensor, stored: dict[str, torch.Tensor]) -> 'StoredTargets':
        return StoredTargets(stored)


class StoredTargets:
    """The same answers, from tensors that come with the batch: the fields of models/distill/teacher_cache.py, padded.

    Hard negatives are chosen while the student trains, so the matching pass is stored for the B pairs alone, and
    `itm_soft` teaches on those.
    """

    def __init__(self, stored: dict[str, torch.Tensor]):
        self.stored = stored
        self.image_tokens = stored.get('image_tokens')

    def features(self, ids: torch.Tensor, mask: torch.Tensor | Unpadded) -> tuple[torch.Tensor, torch.Tensor]:
        return self.stored['image_feat'].float(), self.stored['text_feat'].float()

    def matching(self, ids, mask, negatives, from_all, want_maps) -> Matched:
        found = [self.stored.get(name) for name in ('fused_hidden', 'itm_logits', 'self_map', 'cross_map')]
        if want_maps:  # texts of other processes may be longer than the own ones
            found[2:] = [self._widened(name, ids.shape[1]) for name in ('self_map', 'cross_map')]
        return Matched(*found)

    def _widened(self, name: str, length: int) -> torch.Tensor | None:
        """A map [B, heads, T, keys] for texts padded to `length`: what is added has no probability."""
        if name not in self.stored:
            return None
        more = length - self.stored[name].shape[2]
        return F.pad(self.stored[name], (0, more if name == 'self_map' else 0, 0, more), value=LOWEST)

    def decoding(self, ids, mask, want_maps) -> Decoded:
        return Decoded(*(self.stored.get(name) for name in ('decoder_hidden', 'decoder_self_map', 'decoder_cross_map')))

    def next_tokens(self, decoded: Decoded, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same, of the teacher's k most probable tokens and the sum of all others."""
        return tuple(self.stored[name].flatten(0, 1)[rows] for name in ('lm_ids', 'lm_log_probs', 'lm_rest'))
