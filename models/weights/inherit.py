"""Start the student's towers from bigger or published ones: the teacher, a BERT, a timm ViT.

A tower that is deeper or wider than the student's is cut by one rule, from its weights alone, so that what is kept
computes what it did before (after weight subcloning, Samragh et al. 2023, arXiv 2312.09299, and TinyCLIP, Wu et al.
2023, arXiv 2309.12314):

- layers: the first, the last, or evenly spaced ones from the first to the last (`init_layers`);
- channels: those with the largest weights, summed over all matrices that read or write them; one set for a whole tower,
  since every layer adds to the same residual stream. What reads d of D channels is scaled by sqrt(D / d), so that its
  sums keep their size;
- attention: the heads with the largest |query| |key| |value| |output|, and in each the dimensions with the largest
  |query| |key|, or |value| |output|; queries are rescaled for the narrower heads' softmax;
- feed-forward nets: the neurons with the largest |in| |out|.

Sizes that agree are copied unchanged.
"""

import json
import re
from dataclasses import replace

import torch

from models.blip import BLIP, BLIPConfig
from models.tokenizer import Tokenizer
from models.vit import resample_positions
from models.weights.checks import check_numbers
from models.weights.sources import find_file, load_tokenizer, names_a_file, read_weights
from utils import logger, shorten

LAYER_CHOICES = ('spaced', 'first', 'last')
Weights = dict[str, torch.Tensor]

# Which matrices have the residual stream on their last axis, and which (with norms and biases) on their first.
READS = re.compile(r'((?<!cross)attention\.self\.(query|key|value)|crossattention\.self\.query|intermediate\.dense|'
                   r'transform\.dense|word_embeddings|position_embeddings|predictions\.decoder|attn\.qkv|mlp\.fc1|'
                   r'itm_head|text_proj|vision_proj)\.weight$|^(cls_token|pos_embed)$')
WRITES = re.compile(r'(output\.dense|LayerNorm|transform\.dense|attn\.proj|mlp\.fc2|patch_embed\.proj|norm\d?)\.'
                    r'(weight|bias)$')
STREAM = re.compile(r'_embed(dings\.weight)?$|cls_token$|predictions\.decoder')  # what is in the stream: not scaled
READS_IMAGE = re.compile(r'crossattention\.self\.(key|value)\.weight$')


def choose_layers(kept: int, depth: int, choice: str = 'spaced') -> list[int]:
    """Indices of `kept` of `depth` layers; spaced: evenly from the first to the last (of one: the last).

    Raises:
        ValueError: there are not so many, or the choice is unknown.
    """
    if choice not in LAYER_CHOICES:
        raise ValueError(f'model.init_layers is {shorten(choice)}: one of {", ".join(LAYER_CHOICES)}')
    if kept > depth:
        raise ValueError(f'the student has {kept} layers, what it would start from only {depth}')
    if choice == 'first':
        return list(range(kept))
    if choice == 'last' or kept == 1:
        return list(range(depth - kept, depth))
    return [round(i * (depth - 1) / (kept - 1)) for i in range(kept)]


def pick_layers(weights: Weights, prefix: str, layers: list[int]) -> Weights:
    """The weights with only these layers under `prefix`, numbered anew."""
    picked = {name: weight for name, weight in weights.items() if not name.startswith(prefix)}
    for ours, theirs in enumerate(layers):
        old = f'{prefix}{theirs}.'
        picked |= {f'{prefix}{ours}.{name.removeprefix(old)}': weight for name, weight in weights.items()
                   if name.startswith(old)}
    return picked


def strongest(strength: torch.Tensor, kept: int) -> torch.Tensor:
    """Indices [..., kept] of the largest entries along the last axis, in their order."""
    if kept > strength.shape[-1]:
        raise ValueError(f'the student needs {kept} of {strength.shape[-1]} channels: it is wider than what it would '
                         f'start from')
    return strength.topk(kept).indices.sort().values


def strongest_channels(weights: Weights, kept: int) -> torch.Tensor:
    """The `kept` channels of the residual stream with the largest share in the matrices that read or write them."""
    total = 0
    for name, weight in weights.items():
        if weight.ndim < 2 or not name.endswith('.weight'):
            continue
        for pattern, axis in ((READS, -1), (WRITES, 0)):
            if pattern.search(name):
                strength = weight.float().movedim(axis, 0).flatten(1).square().sum(1)
                total = total + strength / strength.sum().clamp(min=1e-12)
    return strongest(total, kept)


def keep_channels(weights: Weights, channels: torch.Tensor, image_channels: torch.Tensor | None = None) -> Weights:
    """Cut the residual stream to these channels, and the image tokens that cross-attention reads to those."""
    cut = {}
    for name, weight in weights.items():
        for pattern, kept in ((READS, channels), (READS_IMAGE, image_channels)):
            if pattern.search(name) and kept is not None:
                scale = 1 if STREAM.search(name) else (weight.shape[-1] / len(kept)) ** 0.5
                weight = weight[..., kept] * scale
        if WRITES.search(name):
            weight = weight[channels]
        cut[name] = weight
    return cut


def keep_heads(weights: Weights, names: tuple[str, str, str, str], heads: int, kept: int, width: int) -> None:
    """Cut one attention (names of query, key, value, output) to `kept` of its `heads`, `width` wide; in place."""
    query, key, value, output = names
    q, k, v, o = (weights[f'{name}.weight'] for name in names)
    old_width = len(q) // heads
    keyed = (q.norm(dim=1) * k.norm(dim=1)).unflatten(0, (heads, -1))
    valued = (v.norm(dim=1) * o.norm(dim=0)).unflatten(0, (heads, -1))
    head = strongest(keyed.sum(1) * valued.sum(1), kept)
    keys, values = ((head[:, None] * old_width + strongest(strength[head], width)).flatten()
                    for strength in (keyed, valued))
    for name, rows in ((query, keys), (key, keys), (value, values)):
        for part in ('weight', 'bias'):
            weights[f'{name}.{part}'] = weights[f'{name}.{part}'][rows]
    for part in ('weight', 'bias'):  # the scores are divided by the root of the heads' width
        weights[f'{query}.{part}'] = weights[f'{query}.{part}'] * (width / old_width) ** 0.5
    weights[f'{output}.weight'] = o[:, values]


def keep_neurons(weights: Weights, into: str, out: str, kept: int) -> None:
    """Cut one feed-forward net to its `kept` neurons of largest weight, in place."""
    strength = weights[f'{into}.weight'].norm(dim=1) * weights[f'{out}.weight'].norm(dim=0)
    neurons = strongest(strength, kept)
    for name in (f'{into}.weight', f'{into}.bias'):
        weights[name] = weights[name][neurons]
    weights[f'{out}.weight'] = weights[f'{out}.weight'][:, neurons]


def cut_vision(weights: Weights, ours: BLIPConfig, theirs: BLIPConfig, choice: str) -> Weights:
    """A vision tower's weights at the student's sizes."""
    weights = pick_layers(weights, 'blocks.', choose_layers(ours.vision_depth, theirs.vision_depth, choice))
    if ours.vision_width == theirs.vision_width:
        return weights
    weights = keep_channels(weights, strongest_channels(weights, ours.vision_width))
    for i in range(ours.vision_depth):
        attention = f'blocks.{i}.attn'
        parts = tuple(f'{attention}.{part}' for part in ('query', 'key', 'value', 'proj'))
        for kind in ('weight', 'bias'):
            for part, rows in zip(parts, weights[f'{attention}.qkv.{kind}'].chunk(3), strict=False):
                weights[f'{part}.{kind}'] = rows
        keep_heads(weights, parts, theirs.vision_heads, ours.vision_heads, ours.vision_width // ours.vision_heads)
        for kind in ('weight', 'bias'):
            weights[f'{attention}.qkv.{kind}'] = torch.cat([weights.pop(f'{part}.{kind}') for part in parts[:3]])
        keep_neurons(weights, f'blocks.{i}.mlp.fc1', f'blocks.{i}.mlp.fc2', 4 * ours.vision_width)
    return weights


def cut_text(weights: Weights, prefix: str, ours: BLIPConfig, theirs: BLIPConfig, channels: torch.Tensor,
             image_channels: torch.Tensor | None, choice: str) -> Weights:
    """A text tower's weights (its layers under `prefix`) at the student's sizes."""
    weights = pick_layers(weights, prefix, choose_layers(ours.text_depth, theirs.text_depth, choice))
    if ours.text_width != theirs.text_width or ours.vision_width != theirs.vision_width:
        weights = keep_channels(weights, channels, image_channels)
    for i in range(ours.text_depth):
        layer = f'{prefix}{i}.'
        if (ours.text_width, ours.text_heads) != (theirs.text_width, theirs.text_heads):
            for attention in ('attention', 'crossattention'):
                names = tuple(f'{layer}{attention}.{part}'
                              for part in ('self.query', 'self.key', 'self.value', 'output.dense'))
                if f'{names[0]}.weight' in weights:
                    keep_heads(weights, names, theirs.text_heads, ours.text_heads, ours.text_width // ours.text_heads)
        if ours.text_ffn != theirs.text_ffn:
            keep_neurons(weights, f'{layer}intermediate.dense', f'{layer}output.dense', ours.text_ffn)
    return weights


def towers(model: BLIP) -> list[tuple[str, torch.nn.Module, str]]:
    """The text towers there are: (name, module, prefix of its layers)."""
    pairs = (('text_encoder', 'encoder.layer.'), ('text_decoder', 'bert.encoder.layer.'))
    return [(name, getattr(model, name), prefix) for name, prefix in pairs if getattr(model, name) is not None]


def inherit_vision(model: BLIP, teacher: BLIP, choice: str = 'spaced') -> None:
    """Start the vision tower and its projection from the teacher's.

    Raises:
        ValueError: the student's is deeper or wider.
    """
    weights = cut_vision(teacher.visual_encoder.state_dict(), model.config, teacher.config, choice)
    fill(model.visual_encoder, weights, 'the teacher (model.init_vision)')
    if model.text_encoder is not None and teacher.text_encoder is not None:
        projection = keep_channels({f'vision_proj.{name}': weight
                                    for name, weight in teacher.vision_proj.state_dict().items()},
                                   image_channels(model, teacher))
        fill(model, projection, 'the teacher (vision_proj)', partial=True)


def inherit_text(model: BLIP, teacher: BLIP, choice: str = 'spaced') -> None:
    """Start the text towers, their projection, matching head and temperature from the teacher's.

    Raises:
        ValueError: the teacher lacks a tower, or the student's is deeper or wider.
    """
    for name, _, _ in towers(model):
        if getattr(teacher, name) is None:
            raise ValueError(f'model.init_text is teacher, but a teacher of task {teacher.config.task!r} has no {name}')
    channels = text_channels(model, teacher)
    for name, tower, prefix in towers(model):
        weights = getattr(teacher, name).state_dict()
        cut = cut_text(weights, prefix, model.config, teacher.config, channels, image_channels(model, teacher), choice)
        fill(tower, cut, f'the teacher (model.init_text, {name})')
    if model.text_encoder is not None:
        heads = {f'{name}.{part}': weight for name in ('text_proj', 'itm_head')
                 for part, weight in getattr(teacher, name).state_dict().items()}
        fill(model, keep_channels(heads, channels) | {'temp': teacher.temp.data}, 'the teacher (heads)', partial=True)


def image_channels(model: BLIP, teacher: BLIP) -> torch.Tensor:
    """The channels that the student's vision tower keeps of the teacher's."""
    return strongest_channels(teacher.visual_encoder.state_dict(), model.config.vision_width)


def text_channels(model: BLIP, teacher: BLIP) -> torch.Tensor:
    """The channels that the student's text towers keep of the teacher's: encoder and decoder share the word embedding,
    and so the channels."""
    name, _, _ = towers(model)[0]
    return strongest_channels(getattr(teacher, name).state_dict(), model.config.text_width)


def load_timm(model: BLIP, source: str) -> None:
    """Start the vision tower from a timm VisionTransformer of the same sizes.

    Args:
        source: a model of timm by name (cached, or from the hub), a file of its weights, or a folder with one.

    Raises:
        FileNotFoundError: the weights are neither here nor downloadable.
        ValueError: no such model, or it does not fit the tower.
    """
    import timm
    if names_a_file(source):
        weights = read_weights(source)
    else:
        known = timm.models.get_pretrained_cfg(source) if '/' not in source and timm.is_model(source) else None
        repository = known.hf_hub_id if known is not None and known.hf_hub_id else source
        weights = read_weights(repository)
    # a classifier is not part of the tower
    fill(model.visual_encoder, {name: weight for name, weight in weights.items() if not name.startswith('head.')},
         f'{source} (model.init_vision)')


def load_bert(model: BLIP, source: str, tokenizer: Tokenizer, choice: str = 'spaced') -> None:
    """Start the text towers from a BERT: embeddings, self-attention, feed-forward nets, and the language-model head
    where the file has one. Cross-attention, and the rows of [DEC] and [ENC], stay as they were initialised.

    BLIP has no token types: the embedding of type 0, which BERT adds to every token, goes into the positions.

    Args:
        source: a folder of transformers (config.json and weights), or the name of one on the hub.

    Raises:
        FileNotFoundError: it is neither here nor downloadable.
        ValueError: no BERT, another vocabulary, or smaller than the student.
    """
    path = find_file(source, 'config.json')
    try:
        settings = json.loads(path.read_text(encoding='utf-8'))
        if settings.get('model_type', 'bert') != 'bert':
            raise ValueError(f'it is a {shorten(settings["model_type"])}')
        theirs = replace(model.config, text_width=settings['hidden_size'], text_depth=settings['num_hidden_layers'],
                         text_heads=settings['num_attention_heads'], text_ffn=settings['intermediate_size'])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} describes no BERT: {shorten(error, 120)}') from None
    if load_tokenizer(source).vocab != tokenizer.vocab:
        raise ValueError(f'{source} has another vocabulary than `tokenizer`: its word embedding cannot be used')
    weights, ours = read_bert(source), model.config
    channels = strongest_channels(weights, ours.text_width)
    for name, tower, prefix in towers(model):
        lead = prefix.removesuffix('encoder.layer.')
        named = {name if name.startswith('cls.') else f'{lead}{name}': weight for name, weight in weights.items()
                 if name != 'temp' and (lead or not name.startswith('cls.'))}
        cut = cut_text(named, prefix, ours, theirs, channels, None, choice)
        own = tower.state_dict()
        for key, weight in cut.items():
            if re.search('_embeddings|predictions.decoder|predictions.bias', key):
                rows = min(len(weight), len(own[key]))  # [DEC] and [ENC] are new, the student may have fewer positions
                cut[key] = torch.cat([weight[:rows], own[key][rows:]])
        fresh = fill(tower, cut, f'{source} (model.init_text)', partial=True)
        layers = sorted({re.sub(r'\.\d+\.', '.#.', key).rsplit('.', 2)[0] for key in fresh})
        logger.info('%s from %s; initialised afresh: %s', name, source, ', '.join(layers) or 'nothing')


def read_bert(source: str) -> Weights:
    """The weights of a BERT in the names of our text tower, its token type folded in."""
    weights = {}
    for name, weight in read_weights(source).items():
        name = name.removeprefix('bert.').replace('LayerNorm.gamma', 'LayerNorm.weight').replace(
            'LayerNorm.beta', 'LayerNorm.bias')
        if not name.startswith(('pooler.', 'cls.seq_relationship.')) and not name.endswith('position_ids'):
            weights[name] = weight
    kind = weights.pop('embeddings.token_type_embeddings.weight', None)
    if kind is None or 'embeddings.position_embeddings.weight' not in weights:
        raise ValueError(f'{source} holds no weights of a BERT')
    weights['embeddings.position_embeddings.weight'] = weights['embeddings.position_embeddings.weight'] + kind[0]
    if 'cls.predictions.bias' in weights:
        weights['cls.predictions.decoder.bias'] = weights['cls.predictions.bias']
        weights.setdefault('cls.predictions.decoder.weight', weights['embeddings.word_embeddings.weight'])
    return weights


def fill(module: torch.nn.Module, weights: Weights, source: str, partial: bool = False) -> list[str]:
    """A strict load whose error names the source; `partial` lets names be missing and returns them."""
    check_numbers(weights, source)
    own = module.state_dict()
    if 'pos_embed' in own and 'pos_embed' in weights:
        weights = weights | {'pos_embed': resample_positions(weights['pos_embed'], own['pos_embed'])}
    missing = sorted(own.keys() - weights.keys())
    problems = [f'{len(names)} {what} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})' for what, names in (
        ('missing', [] if partial else missing), ('unexpected', sorted(weights.keys() - own.keys())),
        ('misshaped', [f'{name} {tuple(weights[name].shape)} there, {tuple(own[name].shape)} here'
                       for name in sorted(own.keys() & weights.keys()) if own[name].shape != weights[name].shape]))
        if names]
    if problems:
        raise ValueError(f'{source} does not fit the student: {"; ".join(problems)}')
    module.load_state_dict(own | weights)
    return missing
