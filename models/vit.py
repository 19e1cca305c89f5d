"""Vision tower: timm's VisionTransformer, whose parameter names are those of BLIP's checkpoints."""

import math
from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.linear import Linear
from models.norm import LayerNorm, in_stream


class CheckpointedBlock(Block):
    """A transformer block that can trade its activations for a second forward (`recompute = True`).

    torch's non-reentrant checkpoint repeats the autocast state in the recomputation; fairscale's wrapper
    does not (on CPU bf16 it recomputes in float32, on CUDA in fp16).
    """

    recompute = False

    def forward(self, *args, **kwargs):
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)


class PlainAttention(Attention):
    """timm's attention without its options. Queries, keys and values are views of one product, and their gradients are
    not copied as in timm's version."""

    def forward(self, x: torch.Tensor, **_) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2))
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class VisionTower(VisionTransformer):
    """images [B, 3, S, S] -> tokens [B, 1 + (S / patch)^2, width]; token 0 is the class token.

    Args:
        eps: of the layer norms: 1e-6 in BLIP and timm, 1e-5 in transformers' copies of BLIP.
        checkpoint_layers: recompute the activations of the last this many blocks in the backward pass.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int, eps: float = 1e-6,
                 checkpoint_layers: int = 0):
        if width % heads or width % 4:  # a quarter each for sine and cosine of both directions
            raise ValueError(f'vision width {width} is no multiple of 4 and of its {heads} heads')
        super().__init__(img_size=image_size, patch_size=patch_size, embed_dim=width, depth=depth,
                         num_heads=heads, num_classes=0, block_fn=CheckpointedBlock, weight_init='skip',
                         norm_layer=partial(LayerNorm, eps=eps))
        Linear.take_over(self)
        for block in self.blocks:
            block.attn.__class__ = PlainAttention
        if not self.cls_token.is_meta:
            self.scratch_init(image_size // patch_size)
        for block in self.blocks[max(0, depth - checkpoint_layers):]:
            block.recompute = True

    @torch.no_grad()
    def scratch_init(self, side: int) -> None:
        """MAE's initialisation (2-d sine-cosine positions, Xavier weights): used when training from
        scratch; weights of a checkpoint or of timm replace it.
        """
        self.pos_embed[:, 1:] = sincos_positions(self.embed_dim, side)
        self.pos_embed[:, :1] = 0
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        return in_stream(super()._pos_embed(x))

    def forward(self, images: torch.Tensor, layers: Collection[int] | None = None):
        """With `layers` (indices of blocks): (tokens, {layer: its output [B, N, width], before the last norm})."""
        plain = prefers_plain_attention(images.device, self.training)
        for block in self.blocks:
            if block.attn.fused_attn == plain:
                block.attn.fused_attn = not plain
        hidden, states = self.norm_pre(self._pos_embed(self.patch_embed(images))), {}
        for number, block in enumerate(self.blocks):
            hidden = block(hidden)
            if number in (layers or ()):
                states[number] = hidden
        tokens = self.norm(hidden)
        return tokens if layers is None else (tokens, states)


def prefers_plain_attention(device: torch.device, training: bool) -> bool:
    """Whether attention as two products is faster than torch's fused one.

    On a CPU the fused one has a slow backward, and in bf16 a slow forward too: of a pre-training step at 65 tokens
    it made up half.
    """
    return device.type == 'cpu' and (training or torch.is_autocast_enabled('cpu'))


def sincos_positions(width: int, side: int) -> torch.Tensor:
    """2-d sine-cosine position embedding of a side x side grid, row by row -> [1, side^2, width] (MAE)."""
    frequency = 10000 ** -(torch.arange(width // 4) / (width / 4))
    angles = torch.arange(side)[:, None] * frequency
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(1, side * side, width)


def resample_positions(pos_embed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Resample a position embedding [1, 1 + N, width] to the token count of `like` (224 px -> 384 px).

    Bicubic without antialiasing, as BLIP's `interpolate_pos_embed`.
    """
    patches = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    if pos_embed.shape == like.shape or pos_embed.shape[-1] != like.shape[-1] or len(pos_embed) != 1 \
            or patches < 1 or math.isqrt(patches) ** 2 != patches:
        return pos_embed  # the strict load reports what is not a square grid of this width
    side = int((like.shape[1] - 1) ** 0.5)
    return resample_abs_pos_embed(pos_embed, new_size=[side, side], num_prefix_tokens=1, antialias=False)
