"""Files of the original BLIP and dlip-v2 code hold weights only: their architecture is read from the tensor shapes."""

import re

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


def infer_config(weights: dict[str, torch.Tensor], settings: dict | None = None) -> BLIPConfig:
    """The architecture of a state dict in the original layout.

    Head counts leave no trace in the shapes: they are the published ones, unless the file's own config names others.

    Args:
        settings: the file's `config`, of which `vision_heads` and `text_heads` count.

    Raises:
        ValueError: a tensor that tells a size is missing.
    """
    settings = settings or {}
    tower = ENCODER if any(key.startswith(ENCODER) for key in weights) else f'{DECODER}bert.'

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ValueError(f'it has no tensor {name}: neither a checkpoint of this repository nor of BLIP or dlip-v2')
        return weights[name].shape

    def depth(prefix: str) -> int:
        return 1 + max((int(found[1]) for key in weights if (found := re.match(rf'{re.escape(prefix)}(\d+)\.', key))),
                       default=-1)

    vision_width, _, patch_size, _ = shape('visual_encoder.patch_embed.proj.weight')
    patches = shape('visual_encoder.pos_embed')[1] - 1
    vocab_size, text_width = shape(f'{tower}embeddings.word_embeddings.weight')
    layer = f'{tower}encoder.layer.'
    return BLIPConfig(
        image_size=round(patches ** 0.5) * patch_size, patch_size=patch_size, vision_width=vision_width,
        vision_depth=depth('visual_encoder.blocks.'),
        vision_heads=settings.get('vision_heads') or max(1, vision_width // VISION_HEAD_WIDTH),
        text_width=text_width, text_depth=depth(layer), text_heads=settings.get('text_heads') or TEXT_HEADS,
        text_ffn=shape(f'{layer}0.intermediate.dense.weight')[0],
        embed_dim=weights['vision_proj.weight'].shape[0] if 'vision_proj.weight' in weights else 256,
        vocab_size=vocab_size, max_positions=shape(f'{tower}embeddings.position_embeddings.weight')[0],
        task=held_task(weights))
