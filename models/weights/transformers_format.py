"""The layout of the transformers library: a folder of config.json, model.safetensors and tokenizer files.

Read: Salesforce's `blip-image-captioning-base`, `blip-itm-base-coco`, `blip-itm-base-flickr`, or what is written here.
Written: any BLIP of this repository. Its caption nets are transformers' BlipForConditionalGeneration, its retrieval
nets BlipForImageTextRetrieval, key for key. Two things have no place there: the temperature, and a pre-training net as
one model (each of the two classes finds its part of it). What DLIPProd needs beside the weights is under `dlip` in
config.json, where transformers leaves it alone.
"""

import contextlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from data.transforms import MEAN, STD
from models.blip import BLIP, BLIPConfig
from models.text import LAYER_NORM_EPS
from models.tokenizer import Tokenizer
from models.weights.checks import check_tensors
from models.weights.model_card import model_card
from models.weights.originals import held_task
from models.weights.sources import VOCABULARY_FILES, WEIGHT_FILES, find_file, read_weights
from utils import atomic_write, replacing, shorten

# Ours (those of the original BLIP and timm) and theirs; # is a layer number. Names not listed are the same in both.
NAMES = (
    ('visual_encoder.cls_token', 'vision_model.embeddings.class_embedding'),
    ('visual_encoder.pos_embed', 'vision_model.embeddings.position_embedding'),
    ('visual_encoder.patch_embed.proj.', 'vision_model.embeddings.patch_embedding.'),
    ('visual_encoder.blocks.#.norm1.', 'vision_model.encoder.layers.#.layer_norm1.'),
    ('visual_encoder.blocks.#.attn.qkv.', 'vision_model.encoder.layers.#.self_attn.qkv.'),
    ('visual_encoder.blocks.#.attn.proj.', 'vision_model.encoder.layers.#.self_attn.projection.'),
    ('visual_encoder.blocks.#.norm2.', 'vision_model.encoder.layers.#.layer_norm2.'),
    ('visual_encoder.blocks.#.mlp.', 'vision_model.encoder.layers.#.mlp.'),
    ('visual_encoder.norm.', 'vision_model.post_layernorm.'),
)
# The head's tied names, which transformers makes itself.
TIED = ('text_decoder.cls.predictions.decoder.weight', 'text_decoder.cls.predictions.decoder.bias')
CLASSES = {'caption': 'BlipForConditionalGeneration', 'retrieval': 'BlipForImageTextRetrieval'}
FORMAT = 'dlip-folder-1'


def rename(key: str, to_theirs: bool) -> str:
    """One key in the other layout's name."""
    for pair in NAMES:
        source, target = pair if to_theirs else pair[::-1]
        pattern = re.escape(source).replace(r'\#', r'(\d+)')
        if re.match(pattern, key):
            return re.sub(f'^{pattern}', target.replace('#', r'\1'), key)
    return key


def read_folder(source: str | os.PathLike, weights: dict[str, torch.Tensor] | None = None) -> dict:
    """A folder, or a repository of the Hugging Face hub by name -> what a checkpoint of ours holds: `model`,
    `architecture`, and where there: `vocab`, `config`, `metrics`.

    Args:
        weights: of the file `source`, whose other files lie beside it; None: those of the folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no BLIP, or one that differs from BLIP's architecture.
    """
    path = find_file(source, 'config.json')
    weights = read_weights(source) if weights is None else weights
    check_tensors(weights, source)
    weights = {rename(key, to_theirs=False): weight for key, weight in weights.items()}
    try:
        settings = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not valid JSON ({error})') from None
    if not isinstance(settings, dict) or not isinstance(settings.get('dlip', {}), dict):
        raise ValueError(f'{path} must hold a mapping of settings, and its "dlip" too if it has one')
    extra = settings.get('dlip', {})
    if extra.get('format', FORMAT) != FORMAT:
        raise ValueError(f'{path} is of the format {str(extra["format"])[:40]!r}, this version of DLIP reads '
                         f'{FORMAT!r}: use the version that wrote it')
    if 'temperature' in extra:
        if type(extra['temperature']) not in (int, float):
            raise ValueError(f'{path}: the temperature is {str(extra["temperature"])[:40]!r}, no number')
        weights['temp'] = torch.tensor(float(extra['temperature']))
    try:
        architecture = read_config(settings, held_task(weights), path).to_dict()
    except ValueError as error:
        raise ValueError(f'{source} cannot be loaded: {error}') from None
    checkpoint = {'model': weights, 'architecture': architecture,
                  **{key: extra[key] for key in ('config', 'metrics') if key in extra}}
    with contextlib.suppress(FileNotFoundError):  # then the caller names another vocabulary
        checkpoint['vocab'] = Tokenizer.from_file(find_file(source, *VOCABULARY_FILES)).vocab
    return checkpoint


def read_config(settings: dict, task: str, path: Path) -> BLIPConfig:
    """The architecture that a config.json describes.

    Raises:
        ValueError: naming the setting that a BLIP of this repository cannot have.
    """
    from transformers import BlipConfig
    if settings.get('model_type') != 'blip':
        raise ValueError(f'{path} describes a {shorten(settings.get("model_type"))}, not a "blip"')
    try:
        config = BlipConfig.from_dict({key: value for key, value in settings.items() if key != 'dlip'})
    except Exception as error:  # of a kind that differs between versions of transformers
        raise ValueError(f'{path} describes no BLIP ({" ".join(str(error).split())[:200]})') from None
    vision, text = config.vision_config, config.text_config
    for name, value, needed in (('vision_config.hidden_act', vision.hidden_act, 'gelu'),
                                ('text_config.hidden_act', text.hidden_act, 'gelu'),
                                ('text_config.layer_norm_eps', text.layer_norm_eps, LAYER_NORM_EPS),
                                ('vision_config.intermediate_size', vision.intermediate_size, 4 * vision.hidden_size)):
        if value != needed:
            raise ValueError(f'{path}: {name} is {str(value)[:40]}; a BLIP of this repository has {needed}')
    return BLIPConfig(
        image_size=vision.image_size, patch_size=vision.patch_size, vision_width=vision.hidden_size,
        vision_depth=vision.num_hidden_layers, vision_heads=vision.num_attention_heads,
        vision_eps=vision.layer_norm_eps, text_width=text.hidden_size, text_depth=text.num_hidden_layers,
        text_heads=text.num_attention_heads, text_ffn=text.intermediate_size,
        embed_dim=config.image_text_hidden_size, vocab_size=text.vocab_size,
        max_positions=text.max_position_embeddings, dropout=text.hidden_dropout_prob, task=task)


def write_config(config: BLIPConfig, tokenizer: Tokenizer, extra: dict) -> str:
    """The config.json of an architecture."""
    from transformers import BlipConfig
    dropout = {'hidden_dropout_prob': config.dropout, 'attention_probs_dropout_prob': config.dropout}
    return BlipConfig(
        vision_config={'hidden_size': config.vision_width, 'intermediate_size': 4 * config.vision_width,
                       'num_hidden_layers': config.vision_depth, 'num_attention_heads': config.vision_heads,
                       'image_size': config.image_size, 'patch_size': config.patch_size,
                       'layer_norm_eps': config.vision_eps},
        text_config={'vocab_size': config.vocab_size, 'hidden_size': config.text_width,
                     'intermediate_size': config.text_ffn, 'num_hidden_layers': config.text_depth,
                     'num_attention_heads': config.text_heads, 'max_position_embeddings': config.max_positions,
                     'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.sep_id,
                     'sep_token_id': tokenizer.sep_id, 'pad_token_id': tokenizer.pad_id, **dropout},
        image_text_hidden_size=config.embed_dim, architectures=[CLASSES.get(config.task, CLASSES['caption'])],
        dlip=extra).to_json_string(use_diff=False)


def write_folder(folder: str | os.PathLike, model: BLIP, tokenizer: Tokenizer, info: dict) -> None:
    """Write a net with its tokenizer, image settings and model card; each file appears whole or not at all, and
    config.json last: what was cut short is no net, rather than one of two nets' files.

    Args:
        info: `config`, `metrics` of the run that made it (kept in config.json and shown in the card).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    extra = {'format': FORMAT, **{key: info[key] for key in ('config', 'metrics') if info.get(key)}}
    weights = {}
    for key, weight in model.state_dict().items():
        if key == 'temp':
            extra['temperature'] = float(weight)
        elif key not in TIED:
            weights[rename(key, to_theirs=True)] = weight.cpu()
    if model.config.task == 'pretrain':  # what encoder and decoder share is written twice: each class finds all of its
        weights = {key: weight.clone() for key, weight in weights.items()}
    (folder / 'config.json').unlink(missing_ok=True)  # a folder without it is none, until all is written
    with replacing(folder / WEIGHT_FILES[0]) as part:
        save_file(weights, part, metadata={'format': 'pt'})
    tokenizer.save(folder)
    images = {'image_processor_type': 'BlipImageProcessor', 'processor_class': 'BlipProcessor',
                'do_convert_rgb': True, 'do_resize': True, 'do_rescale': True, 'do_normalize': True,
                'size': {'height': model.config.image_size, 'width': model.config.image_size}, 'resample': 3,
                'rescale_factor': 1 / 255, 'image_mean': list(MEAN), 'image_std': list(STD)}
    for name, text in (('preprocessor_config.json', json.dumps(images, indent=2) + '\n'),
                       ('README.md', model_card(model, info)),
                       ('config.json', write_config(model.config, tokenizer, extra))):
        with atomic_write(folder / name) as file:
            file.write(text)
