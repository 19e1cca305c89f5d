"""BLIP (Li et al., 2022, arXiv 2201.12086): one class for the teacher and every student."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from models.linear import Linear, Unpadded
from models.text import ImageKV, KVCache, TextDecoder, TextTower, tie_decoder
from models.vit import VisionTower
from utils import shorten

TEMPERATURE = 0.07  # at the start of training, as BLIP
TASKS = ('pretrain', 'retrieval', 'caption')


@dataclass(frozen=True)
class BLIPConfig:
    """Architecture of a BLIP. It travels in every checkpoint, so that a file alone rebuilds its net.

    `task` says which text parts exist: 'pretrain' has encoder and decoder (tied), 'retrieval' the encoder
    with its projections and matching head, 'caption' the decoder.

    Raises:
        ValueError: naming the setting that no net can have.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_depth: int
    vision_heads: int
    text_width: int
    text_depth: int
    text_heads: int
    text_ffn: int
    embed_dim: int = 256
    vocab_size: int = 30524
    max_positions: int = 512
    vision_eps: float = 1e-6
    dropout: float = 0.1
    task: str = 'pretrain'

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f'unknown task {shorten(self.task)}: one of {", ".join(TASKS)}')
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f'{field.name} must be a whole number from 1 on, got {shorten(value)}')
        for name, low, high in (('vision_eps', 1e-12, 0.01), ('dropout', 0, 1)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise ValueError(f'{name} must be a number from {low} to {high}, got {shorten(value)}')
        if self.image_size % self.patch_size:
            raise ValueError(f'image size {self.image_size} is not a multiple of the patch size {self.patch_size}')
        for tower in ('vision', 'text'):
            width, heads = getattr(self, f'{tower}_width'), getattr(self, f'{tower}_heads')
            if width % heads:
                raise ValueError(f'{tower} width {width} is not divisible by its {heads} heads')

    def to_dict(self) -> dict:
        return asdict(self)


class BLIP(nn.Module):
    """Vision tower, text encoder and text decoder with the parameter names of the original checkpoints.

    Args:
        config: the architecture.
        vit_ckpt_layer: recompute the activations of the last this many ViT blocks (training memory).
    """

    def __init__(self, config: BLIPConfig, vit_ckpt_layer: int = 0):
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.image_size, config.patch_size, config.vision_width,
                                          config.vision_depth, config.vision_heads, config.vision_eps, vit_ckpt_layer)
        self.text_encoder = self.text_decoder = None
        if config.task != 'caption':
            self.text_encoder = build_text_tower(config)
            self.vision_proj = Linear(config.vision_width, config.embed_dim)
            self.text_proj = Linear(config.text_width, config.embed_dim)
            self.itm_head = Linear(config.text_width, 2)
            self.temp = nn.Parameter(torch.tensor(TEMPERATURE))
        if config.task != 'retrieval':
            self.text_decoder = TextDecoder(build_text_tower(config))
        if config.task == 'pretrain':
            tie_decoder(self.text_encoder, self.text_decoder)

    @property
    def device(self) -> torch.device:
        return self.visual_encoder.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        return self.visual_encoder.cls_token.dtype

    def compile_towers(self, **options) -> None:
        """`compile_layers` of all towers."""
        compile_layers(self.visual_encoder, self.text_encoder, self.text_decoder and self.text_decoder.bert, **options)

    def encode_image(self, images: torch.Tensor, layers: Collection[int] | None = None):
        """images [B, 3, S, S] normalised float -> image tokens [B, N, vision_width]

        With `layers` (indices of blocks): (tokens, {layer: its output [B, N, vision_width]}).
        """
        images = images.to(self.dtype)
        return self.visual_encoder(images) if layers is None else self.visual_encoder(images, layers)

    def project_image(self, image_tokens: torch.Tensor) -> ImageKV:
        """Image tokens -> cross-attention keys and values, valid for the encoder and the (tied) decoder."""
        tower = self.text_encoder if self.text_encoder is not None else self.text_decoder.bert
        return tower.project_image(image_tokens)

    def image_feat(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """image tokens [B, N, vision_width] -> unit-norm float32 embedding [B, embed_dim]"""
        return F.normalize(self.vision_proj(image_tokens[:, 0]).float(), dim=-1)

    def text_feat(self, ids: torch.Tensor, mask: torch.Tensor | Unpadded, layers: Collection[int] | None = None):
        """ids, mask [B, T] starting with [CLS] -> unit-norm float32 embedding [B, embed_dim]

        With `layers`: (embedding, {layer: its output [B, T, text_width]}).
        """
        output = self.text_encoder(ids, mask, first_only=True, layers=layers or ())
        feature = F.normalize(self.text_proj(output.hidden[:, 0]).float(), dim=-1)
        return feature if layers is None else (feature, output.states)

    def match_logits(self, ids: torch.Tensor, mask: torch.Tensor, image_kv: ImageKV,
                     image_index: torch.Tensor | None = None) -> torch.Tensor:
        """Image-text matching logits [R, 2] (column 1: match) of texts starting with [ENC].

        Row r is matched with image `image_index[r]` of `image_kv`; None: rows are spread evenly over the
        images, the rows of an image side by side (row i with image i when there are as many).
        """
        hidden = self.text_encoder(ids, mask, image_kv=select_images(image_kv, image_index), first_only=True).hidden
        return self.itm_head(hidden[:, 0])

    def caption_logits(self, ids: torch.Tensor, mask: torch.Tensor, image_kv: ImageKV) -> torch.Tensor:
        """ids, mask [R, T] of captions starting with [DEC] -> float32 logits [R, T - 1, V] of the tokens 1 to T - 1."""
        hidden = self.text_decoder.bert(ids, mask, causal=True, image_kv=image_kv).hidden
        return self.text_decoder.logits(hidden[:, :-1]).float()

    def next_logits(self, ids: torch.Tensor, image_kv: ImageKV, cache: KVCache) -> torch.Tensor:
        """Feed the decoder ids [R, T] after the cached positions -> float32 logits [R, V] of the token after them."""
        hidden = self.text_decoder.bert(ids, causal=True, image_kv=image_kv, cache=cache).hidden
        return self.text_decoder.logits(hidden[:, -1]).float()


def build_text_tower(config: BLIPConfig, cross_attention: bool = True) -> TextTower:
    return TextTower(config.vocab_size, config.text_width, config.text_depth, config.text_heads, config.text_ffn,
                     config.vision_width if cross_attention else 0, config.dropout, config.max_positions)


def compile_layers(vision: VisionTower, *texts: TextTower | None, **options) -> None:
    """torch.compile of the towers' layers, in place. Equal layers share a compiled form, as do texts of every length;
    compiling whole towers is not faster and takes several times as long.

    Args:
        options: torch.compile's.
    """
    # A layer has a form for each kind of pass of teacher and student, so more than the default 8 are expected.
    torch._dynamo.config.recompile_limit = 64
    for block in vision.blocks:
        block.compile(**options)
    for tower in texts:
        for layer in tower.layers if tower is not None else ():
            layer.compile(dynamic=True, **options)


def select_images(image_kv: ImageKV, image_index: torch.Tensor | None) -> ImageKV:
    """The keys and values of the images `image_index` [R] (all of them, in order, when None)."""
    if image_index is None:
        return image_kv
    if isinstance(image_kv, torch.Tensor):
        return image_kv[:, :, image_index]
    return [(k[image_index], v[image_index]) for k, v in image_kv]


def with_negatives(image_kv: ImageKV, negatives: ImageKV) -> ImageKV:
    """Keys and values for matching 3 B texts: the first and last B with the images of `image_kv` [B], the middle B with
    the negative images [B]."""
    return [(*own, *other) for own, other in zip(image_kv, negatives, strict=True)]
