"""Text tower: a BERT with cross-attention to image tokens, as BLIP's encoder and decoder.

Parameter names are those of the original BLIP checkpoints (BLIP's `med.py`). Attention is torch's
scaled_dot_product_attention; attention maps are computed only where a loss asks for them. The image's keys
and values are projected once per image (`project_image`) and shared by every pass over that image: the
matching pass, the decoder (whose cross-attention is tied), all decode steps and all beams.
"""

import math
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.linear import Linear, Unpadded, all_of, pad, spread, unpad
from models.norm import LayerNorm
from models.vit import prefers_plain_attention

LAYER_NORM_EPS = 1e-12  # BERT's
# Per layer keys and values, each [images, heads, N, D]; or all of them in one tensor [layers, 2, images, heads, N, D].
# In matching with negatives, of each layer keys, values, and those of the negative images (`with_negatives`).
ImageKV = list[tuple[torch.Tensor, ...]] | torch.Tensor


class TextOutput(NamedTuple):
    """hidden [R, T, width]; the maps are log-probabilities [R, heads, T, keys] of the last layer, or None; the states
    are the outputs [R, T, width] of the layers that were asked for.
    """

    hidden: torch.Tensor
    self_map: torch.Tensor | None = None
    cross_map: torch.Tensor | None = None
    states: dict[int, torch.Tensor] | None = None


class KVCache:
    """Static self-attention cache of all layers, one tensor [layers, 2, R, heads, capacity, D] filled from the left."""

    def __init__(self, layers: int, capacity: int):
        self.layers, self.capacity = layers, capacity
        self.length = 0
        self.store: torch.Tensor | None = None

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new positions [R, heads, T, D] of a layer; return all its keys and values so far."""
        if self.store is None:
            self.store = k.new_empty(self.layers, 2, *k.shape[:2], self.capacity, k.shape[3])
        end = self.length + k.shape[2]
        self.store[layer, 0, :, :, self.length:end] = k
        self.store[layer, 1, :, :, self.length:end] = v
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the given rows, in that order (beam search moves hypotheses; finished rows are dropped)."""
        kept = self.store.new_empty(*self.store.shape[:2], len(rows), *self.store.shape[3:])
        kept[..., :self.length, :] = self.store[:, :, rows, :, :self.length]
        self.store = kept


class Projections(nn.Module):
    def __init__(self, width: int, memory_width: int):
        super().__init__()
        self.query = Linear(width, width)
        self.key = Linear(memory_width, width)
        self.value = Linear(memory_width, width)


class ResidualNorm(nn.Module):
    """dense -> dropout -> add -> LayerNorm (BERT is post-norm)."""

    def __init__(self, width_in: int, width: int, dropout: float):
        super().__init__()
        self.dense = Linear(width_in, width)
        self.LayerNorm = LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = dropout

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(F.dropout(self.dense(x), self.dropout, self.training) + residual)


class Attention(nn.Module):
    """Multi-head attention of text queries over text (self) or image (cross) keys."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float):
        super().__init__()
        if width % heads:
            raise ValueError(f'text width {width} is not divisible by its {heads} heads')
        self.self = Projections(width, memory_width)
        self.output = ResidualNorm(width, width, dropout)
        self.heads = heads
        self.dropout = dropout

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[R, T, width] -> [R, heads, T, D]"""
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def keys_values(self, memory: torch.Tensor, texts: Unpadded | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self.split(spread(project(memory), texts)) for project in (self.self.key, self.self.value))

    def forward(self, hidden: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *negatives: torch.Tensor,
                mask: torch.Tensor | None = None, want_map: bool = False, texts: Unpadded | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden [R, T, width], or [M, width] of unpadded texts; k, v [R or images, heads, N, D]; mask bool, True = may
        attend.

        Given `negatives`, further keys and values, the second third of the rows attends to them and the other rows to k
        and v, without copying either.
        """
        q = self.split(spread(self.self.query(hidden), texts))
        if negatives:
            thirds = q.unflatten(0, (3, -1))
            both = thirds[::2].permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, heads, 2 T, D]
            context, log_map = map(in_thirds, self.attend(both, k, v, None, want_map),
                                   self.attend(thirds[1], *negatives, None, want_map))
        else:
            context, log_map = self.attend(q, k, v, mask, want_map)
        return self.output(unpad(context.transpose(1, 2).flatten(2), texts), hidden), log_map

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, want_map: bool
               ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q [R, heads, T, D] -> context [R, heads, T, D] and, where it is wanted, the log-map [R, heads, T, N].

        With fewer images than rows (R = images x group, rows of an image side by side), the rows of an image
        are folded into the query length, so that beams and texts share its keys and values without a copy.
        """
        length, group = q.shape[2], q.shape[0] // k.shape[0]
        if group > 1:
            q = q.unflatten(0, (-1, group)).transpose(1, 2).flatten(2, 3)  # [images, heads, group * T, D]
        log_map, dropout = None, self.dropout if self.training else 0.0
        if want_map:
            scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            log_map = scores.log_softmax(-1)
            context = F.dropout(log_map.exp(), dropout).to(v.dtype) @ v
        elif prefers_plain_attention(q.device, self.training):
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            context = F.dropout(scores.softmax(-1), dropout).to(v.dtype) @ v
        else:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        if group > 1:
            context, log_map = (x if x is None else x.unflatten(2, (group, length)).transpose(1, 2).flatten(0, 1)
                                for x in (context, log_map))
        return context, log_map


def in_thirds(both: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """both [B, heads, 2 T, D], of the first and the last third, and other [B, heads, T, D] -> [3 B, heads, T, D]"""
    if both is None:
        return None
    first, last = both.unflatten(2, (2, -1)).unbind(2)
    return torch.cat([x.transpose(1, 2) for x in (first, other, last)]).transpose(1, 2)  # as attention lays it out


class Intermediate(nn.Module):
    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.dense = Linear(width, ffn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.dense(x))


class TextLayer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, image_width: int, dropout: float):
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        if image_width:
            self.crossattention = Attention(width, image_width, heads, dropout)
        self.intermediate = Intermediate(width, ffn)
        self.output = ResidualNorm(ffn, width, dropout)

    def forward(self, hidden, mask, image_kv, want_maps, extend, first_only, texts):
        k, v = self.attention.keys_values(hidden, texts)
        if extend is not None:
            k, v = extend(k, v)
        if first_only:
            hidden, texts = spread(hidden, texts)[:, :1], None
        hidden, self_map = self.attention(hidden, k, v, mask=mask, want_map=want_maps, texts=texts)
        cross_map = None
        if image_kv is not None:
            hidden, cross_map = self.crossattention(hidden, *image_kv, want_map=want_maps, texts=texts)
        return self.output(self.intermediate(hidden), hidden), self_map, cross_map


class Embeddings(nn.Module):
    def __init__(self, vocab_size: int, width: int, max_positions: int, dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(max_positions, width)
        self.LayerNorm = LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = dropout

    def forward(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        positions = self.position_embeddings.weight[start:start + ids.shape[1]]
        return F.dropout(self.LayerNorm(self.word_embeddings(ids) + positions), self.dropout, self.training)


class TextTower(nn.Module):
    """BERT: bidirectional or causal, with or without image tokens.

    Args:
        image_width: width of the image tokens; 0 builds a tower without cross-attention.
    """

    def __init__(self, vocab_size: int, width: int, depth: int, heads: int, ffn: int, image_width: int,
                 dropout: float, max_positions: int):
        super().__init__()
        self.embeddings = Embeddings(vocab_size, width, max_positions, dropout)
        self.encoder = nn.ModuleDict({'layer': nn.ModuleList(
            TextLayer(width, heads, ffn, image_width, dropout) for _ in range(depth))})
        self.embeddings.apply(init_bert)
        self.encoder.apply(partial(init_bert, std=0.02 * (768 / width) ** 0.5))  # BERT's 0.02 is for a width of 768

    @property
    def layers(self) -> nn.ModuleList:
        return self.encoder['layer']

    def project_image(self, image_tokens: torch.Tensor) -> ImageKV:
        """image tokens [images, N, image_width] -> every layer's keys and values."""
        maps = [getattr(layer.crossattention.self, name) for layer in self.layers for name in ('key', 'value')]
        found = [self.layers[0].crossattention.split(x) for x in all_of(maps, image_tokens)]
        return list(zip(found[::2], found[1::2], strict=True))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | Unpadded | None = None, causal: bool = False,
                image_kv: ImageKV | None = None, want_maps: bool = False, first_only: bool = False,
                cache: KVCache | None = None, layers: Collection[int] = ()) -> TextOutput:
        """ids [R, T] int64; mask [R, T], 1 = token, 0 = pad (right-padded), or `Unpadded`; None = no pads.

        With a cache, `ids` continue the cached positions (causal, no pads). `want_maps` returns the last layer's
        attention maps, `layers` the states of the layers with these indices. `first_only` computes the last layer for
        position 0 alone, all that an embedding or a matching score needs (bidirectional; hidden is [R, 1, width]); it
        is ignored if `layers` contains the last one.
        """
        start, length = cache.length if cache else 0, ids.shape[1]
        texts, mask = (mask, mask.mask) if isinstance(mask, Unpadded) else (None, mask)
        attend = mask[:, None, None, :].bool() if mask is not None else None
        if causal and length > 1:
            past = torch.ones(length, start + length, dtype=torch.bool, device=ids.device).tril(start)
            attend = past if attend is None else attend & past
        hidden = unpad(self.embeddings(ids, start), texts)
        self_map, cross_map, states = None, None, {}
        for i, layer in enumerate(self.layers):
            extend = None if cache is None else (lambda k, v, i=i: cache.extend(i, k, v))
            last = i == len(self.layers) - 1
            first = first_only and last and i not in layers
            # not compiled: a cache, which would need a form for every length, and a layer for one position
            run = layer if cache is None and not first else layer.forward
            hidden, self_map, cross_map = run(hidden, attend, image_kv[i] if image_kv is not None else None,
                                              want_maps and last, extend, first, texts)
            if i in layers:
                states[i] = pad(hidden, texts)
        if not first:
            hidden = pad(hidden, texts)
        if cache is not None:
            cache.length += length
        return TextOutput(hidden, self_map, cross_map, states)


class LMHead(nn.Module):
    """Dense, GELU, LayerNorm, then the (shared) word embedding with a bias."""

    def __init__(self, word_embeddings: nn.Embedding):
        super().__init__()
        vocab_size, width = word_embeddings.weight.shape
        self.transform = nn.Module()
        self.transform.dense = Linear(width, width)
        self.transform.LayerNorm = LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder = Linear(width, vocab_size)
        self.apply(init_bert)
        self.tie(word_embeddings)

    def tie(self, word_embeddings: nn.Embedding) -> None:
        self.decoder.weight = word_embeddings.weight
        self.bias = self.decoder.bias  # the checkpoints hold the bias under both names

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.transform.LayerNorm(F.gelu(self.transform.dense(hidden)))
        return self.decoder(hidden)


class TextDecoder(nn.Module):
    """A causal text tower (`bert`) with a language-model head (`cls.predictions`)."""

    def __init__(self, bert: TextTower):
        super().__init__()
        self.bert = bert
        self.cls = nn.Module()
        self.cls.predictions = LMHead(bert.embeddings.word_embeddings)

    def tie_head(self) -> None:
        """Let the head score with the word embedding itself (after either was replaced)."""
        self.cls.predictions.tie(self.bert.embeddings.word_embeddings)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., width] -> logits [..., vocabulary]"""
        return self.cls.predictions(hidden)


def tie_decoder(encoder: TextTower, decoder: TextDecoder) -> None:
    """Share everything but the self-attention, as BLIP does (its `tie_encoder_decoder_weights`)."""
    decoder.bert.embeddings = encoder.embeddings
    decoder.tie_head()
    for ours, theirs in zip(decoder.bert.layers, encoder.layers, strict=True):
        ours.crossattention = theirs.crossattention
        ours.intermediate = theirs.intermediate
        ours.output = theirs.output


def init_bert(module: nn.Module, std: float = 0.02) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, 'bias', None) is not None:
            nn.init.zeros_(module.bias)
