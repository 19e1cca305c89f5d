"""Momentum encoder and feature queues (MoCo, ALBEF, BLIP), for pre-training and retrieval finetuning."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from models.blip import BLIP, build_text_tower
from models.linear import Linear, Unpadded
from models.norm import autocast_dtype
from models.vit import VisionTower, resample_positions

NO_ID = torch.iinfo(torch.long).min  # id of a queue entry without a sample


class MomentumQueue(nn.Module):
    """An exponential moving average of the student's two feature towers, and the last `queue_size` features.

    It holds only what the features need: no cross-attention, matching head or decoder. Parameters have the student's
    names, by which the average pairs them.

    Args:
        student: the net to follow; the momentum encoder starts equal to it.
        queue_size: features kept; need not be a multiple of the batch. 0: no queues, an update's pairs are compared
            with each other alone.
        momentum: decay of the average per optimizer step.
        teacher_dim: embedding width of a teacher whose features of the same pairs are queued too; 0: none.
    """

    def __init__(self, student: BLIP, queue_size: int, momentum: float, teacher_dim: int = 0):
        super().__init__()
        config = student.config
        self.visual_encoder = VisionTower(config.image_size, config.patch_size, config.vision_width,
                                          config.vision_depth, config.vision_heads, config.vision_eps)
        self.text_encoder = build_text_tower(config, cross_attention=False)
        self.vision_proj = Linear(config.vision_width, config.embed_dim)
        self.text_proj = Linear(config.text_width, config.embed_dim)
        self.momentum = momentum
        self.requires_grad_(False)
        self.copy_from(student)
        self.queue_size = queue_size
        if queue_size:
            dims = {'image_queue': config.embed_dim, 'text_queue': config.embed_dim}
            if teacher_dim:
                dims |= {'teacher_image_queue': teacher_dim, 'teacher_text_queue': teacher_dim}
            for name, dim in dims.items():
                self.register_buffer(name, F.normalize(torch.randn(queue_size, dim), dim=1))
            self.register_buffer('id_queue', torch.full((queue_size,), NO_ID))
            self.register_buffer('pointer', torch.zeros((), dtype=torch.long))

    def pairs(self, student: BLIP) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The momentum encoder's parameters and the student's of the same names."""
        theirs = dict(student.named_parameters())
        names, ours = zip(*self.named_parameters(), strict=True)
        return [p.data for p in ours], [theirs[name].data for name in names]

    def copy_from(self, student: BLIP) -> None:
        torch._foreach_copy_(*self.pairs(student))

    @torch.no_grad()
    def update(self, student: BLIP) -> None:
        """own = momentum * own + (1 - momentum) * student's, after each optimizer step"""
        ours, theirs = self.pairs(student)
        torch._foreach_lerp_(ours, theirs, 1 - self.momentum)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | Unpadded
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """images [B, 3, S, S], ids and mask [B, T] -> unit-norm image and text features [B, embed_dim]

        Under autocast all weights are cast at once, which autocast does one by one.
        """
        dtype = autocast_dtype(images.device)
        if dtype is None:
            return self(images, ids, mask)
        names, weights = zip(*self.named_parameters(), strict=True)
        cast = [torch.empty_like(x, dtype=dtype) for x in weights]
        torch._foreach_copy_(cast, weights)
        with torch.autocast(images.device.type, enabled=False):
            return functional_call(self, dict(zip(names, cast, strict=True)), (images.to(dtype), ids, mask))

    def forward(self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | Unpadded
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `encode` returns, in the precision of the weights and of autocast."""
        image = self.vision_proj(self.visual_encoder(images)[:, 0]).float()
        text = self.text_proj(self.text_encoder(ids, mask, first_only=True).hidden[:, 0]).float()
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    @torch.no_grad()
    def take_over(self, held: dict[str, torch.Tensor], columns: tuple[str, ...]) -> tuple[bool, int]:
        """Start from the momentum encoder and the queues that an earlier stage ended with, each where it fits.

        Of queues of another length the newest entries fill what they can, in their order, and the oldest leave first.
        An entry keeps no id: the data may be others.

        Args:
            held: by the names of this module's `state_dict`; what it lacks is left alone.
            columns: the queues that must come together ('image', ...), since a column is one pair in all of them.

        Returns:
            whether the encoder was taken over, and how many entries of the queues.
        """
        own, position = dict(self.named_parameters()), 'visual_encoder.pos_embed'
        if position in held:
            held = held | {position: resample_positions(held[position].float(), own[position])}
        weights = {name: held[name] for name in own if name in held}
        encoder = len(weights) == len(own) and all(weights[name].shape == own[name].shape and x.sum().isfinite()
                                                   for name, x in weights.items())
        if encoder:
            self.load_state_dict(weights, strict=False)
        names = [f'{name}_queue' for name in columns]
        found = [held[name].float() for name in names if name in held]
        if not self.queue_size or len(found) < len(names) or len({len(queue) for queue in found}) > 1 or not all(
                queue.shape[1:] == self.get_buffer(name).shape[1:] and queue.sum().isfinite()
                for name, queue in zip(names, found, strict=True)):
            return encoder, 0
        count = min(self.queue_size, len(found[0]))
        for name, queue in zip(names, found, strict=True):
            in_order = queue.roll(-int(held.get('pointer', 0)), 0)  # from the oldest to the newest
            self.get_buffer(name)[-count:] = F.normalize(in_order[-count:], dim=1)
        self.id_queue.fill_(NO_ID)
        self.pointer.zero_()
        return encoder, count

    def behind(self, **rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """`id` [N] and features [N, E], each followed by its queue -> [N + queue, ...]"""
        if not self.queue_size:
            return rows
        return {name: torch.cat([own, self.get_buffer(f'{name}_queue')]) for name, own in rows.items()}

    @torch.no_grad()
    def enqueue(self, ids: torch.Tensor, **features: torch.Tensor) -> None:
        """Overwrite the oldest entries with the update's pairs: ids [N], `image`, `text`, ... features [N, E].

        Call it once an update, after its losses were computed: a batch in its own queue would be its own negative.
        """
        size = self.queue_size
        if not size or not features:
            return
        rows = (self.pointer + torch.arange(len(ids), device=ids.device)[-size:]) % size
        for name, feature in features.items():
            self.get_buffer(f'{name}_queue')[rows] = feature[-size:].float()
        self.id_queue[rows] = ids[-size:]
        self.pointer.add_(len(ids)).remainder_(size)
