"""Files of the original BLIP and dlip-v2 code hold weights only: their architecture is read from the tensor shapes."""

import math
import re
from dataclasses import MISSING, fields

import torch

from models.blip import BLIPConfig

VISION_HEAD_WIDTH = 64  # of every published ViT: 6 heads of 384, 12 of 768
TEXT_HEADS = 12  # of every published text tower, dlip-v2's small one included
HOLDERS = {'text_encoder': 'model_base.pth, model_base_capfilt_large.pth, model_base_retrieval_coco.pth or '
                           'model_base_retrieval_flickr.pth',
           'text_decoder': 'model_base.pth, model_base_capfilt_large.pth or model_base_caption_capfilt_large.pth'}
VOCABULARY = 'bert-base-uncased'
ENCODER, DECODER = 'text_encoder.', 'text_decoder.'


def held_task(weights: dict[str, torch.Tensor]) -> str:
    """What a state dict can do: 'pretrain' (both), 'retrieval' (it has the encoder) or 'caption' (the decoder).

    Raises:
        ValueError: it has neither.
    """
    held = [task for task, prefix in (('retrieval', ENCODER), ('caption', DECODER))
            if any(key.startswith(prefix) for key in weights)]
    if not held:
        raise ValueError('it has neither a text_encoder nor a text_decoder: not a BLIP for captions or retrieval')
    return 'pretrain' if len(held) == 2 else held[0]


def momentum_state(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The momentum encoder and queues of a state dict in the original layout, by `MomentumQueue`'s names."""
    found = {name.replace('_m.', '.', 1): weight for name, weight in weights.items()
             if re.match(r'(visual_encoder|text_encoder|vision_proj|text_proj)_m\.', name)}
    found |= {name: weights[name].T for name in ('image_queue', 'text_queue') if name in weights}  # [E, Q] there
    pointers = [weights[name] for name in ('queue_ptr', 'ptr_queue') if name in weights]
    return found | ({'pointer': pointers[0]} if pointers else {})


def infer_config(weights: dict[str, torch.Tensor], settings: dict | None = None) -> BLIPConfig:
    """The architecture of a state dict in the original layout.

    Head counts leave no trace in the shapes: they are the published ones, unless the file's own config names others.

    Args:
        settings: the file's `config`, of which `vision_heads` and `text_heads` count.

    Raises:
        ValueError: a tensor that tells a size is missing or misshaped, or a layer is missing between others.
    """
    settings = {name: heads for name, heads in settings.items() if heads is not None} \
        if isinstance(settings, dict) else {}
    tower = ENCODER if any(key.startswith(ENCODER) for key in weights) else f'{DECODER}bert.'

    def shape(name: str, axes: int) -> torch.Size:
        if name not in weights:
            raise ValueError(f'it has no tensor {name}: neither a checkpoint of this repository nor of BLIP or dlip-v2')
        if weights[name].ndim != axes:
            raise ValueError(f'{name} has the shape {tuple(weights[name].shape)}: it should have {axes} axes')
        return weights[name].shape

    def depth(prefix: str) -> int:
        pattern = re.compile(rf'{re.escape(prefix)}(\d{{1,9}})\.')
        layers = sorted({int(found[1]) for key in weights if (found := pattern.match(key))})
        if layers != list(range(len(layers))):
            raise ValueError(f'of the layers {prefix}0 to {prefix}{layers[-1]} it has only {len(layers)}')
        return len(layers)

    vision_width, _, patch_size, _ = shape('visual_encoder.patch_embed.proj.weight', 4)
    patches = shape('visual_encoder.pos_embed', 3)[1] - 1
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise ValueError(f'its position embeddings are of {patches} patches, which make no square image')
    vocab_size, text_width = shape(f'{tower}embeddings.word_embeddings.weight', 2)
    layer = f'{tower}encoder.layer.'
    return BLIPConfig(
        image_size=math.isqrt(patches) * patch_size, patch_size=patch_size, vision_width=vision_width,
        vision_depth=depth('visual_encoder.blocks.'),
        vision_heads=settings.get('vision_heads', max(1, vision_width // VISION_HEAD_WIDTH)),
        text_width=text_width, text_depth=depth(layer), text_heads=settings.get('text_heads', TEXT_HEADS),
        text_ffn=shape(f'{layer}0.intermediate.dense.weight', 2)[0],
        embed_dim=shape('vision_proj.weight', 2)[0] if 'vision_proj.weight' in weights else 256,
        vocab_size=vocab_size, max_positions=shape(f'{tower}embeddings.position_embeddings.weight', 2)[0],
        task=held_task(weights))


def described_config(architecture: dict, weights: dict[str, torch.Tensor]) -> BLIPConfig:
    """The architecture that a file describes, once its tensors agree: a file may claim any size.

    Raises:
        ValueError: naming what is unknown, missing, impossible, or other than the tensors say.
    """
    if not isinstance(architecture, dict):
        raise ValueError(f'its architecture is {type(architecture).__name__}, not a mapping')
    known = {field.name: field.default is MISSING for field in fields(BLIPConfig)}
    unknown = sorted(str(key)[:40] for key in architecture.keys() - known.keys())
    missing = [name for name, needed in known.items() if needed and name not in architecture]
    if unknown or missing:
        raise ValueError(f'its architecture has the unknown {unknown[0]!r}' if unknown else
                         f'its architecture lacks {missing[0]!r}')
    config = BLIPConfig(**architecture)
    held = infer_config(weights, architecture)
    no_trace = {'vision_eps', 'dropout', *(() if 'vision_proj.weight' in weights else ('embed_dim',)),
                *(('task',) if held.task == 'pretrain' else ())}
    for name, value in config.to_dict().items():
        if name not in no_trace and getattr(held, name) != value:
            raise ValueError(f'its architecture says {name} {value}, its tensors {getattr(held, name)}')
    return config
