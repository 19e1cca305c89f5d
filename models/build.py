"""Build student and teacher from a config. Order of a start, as every script does it: (1) the run's own
`last.pth` (models/training.py), (2) `model.init`, (3) `init_vision` / `init_text`, (4) scratch."""

from dataclasses import replace

import torch

from models.blip import BLIP
from models.checkpoint import architecture, build, load_weights, read_checkpoint, stored_config
from models.objective import TEACHER_TERMS
from models.tokenizer import Tokenizer
from models.vit import resample_positions
from utils import logger


def build_teacher(settings: dict, tokenizer: Tokenizer, task: str) -> BLIP | None:
    """The frozen net of `teacher.weights`: a checkpoint of this repository or an original BLIP `.pth`.

    It has the parts of `task`, or, of a retrieval or caption checkpoint, those that the file holds: the terms that
    need no other still work (`Objective` names the ones that do not).

    Raises:
        ValueError: it does not fit `teacher.size`, or was trained with another vocabulary.
    """
    path = settings['weights']
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    config = stored_config(checkpoint, path)
    config = replace(config, task=task if config.task == 'pretrain' else config.task)
    if checkpoint.get('vocab', tokenizer.vocab) != tokenizer.vocab:
        raise ValueError(f'the teacher {path} was trained with another vocabulary ({len(checkpoint["vocab"])} '
                         f'tokens, `tokenizer` has {len(tokenizer)}): its logits cannot teach; use its vocabulary')
    named = architecture(settings['size'], config.image_size, config.vocab_size, config.task)
    if replace(config, dropout=named.dropout, vision_eps=named.vision_eps) != named:
        raise ValueError(f'the teacher {path} is not of teacher.size {settings["size"]!r}: it is {config}')
    teacher = build(config, checkpoint['model'], str(path))
    logger.info('teacher %s: %.1fM parameters', path, count_parameters(teacher) / 1e6)
    return teacher


def at_resolution(teacher: BLIP, image_size: int) -> BLIP:
    """The teacher for pictures of another size: position embeddings resampled."""
    if teacher.config.image_size == image_size:
        return teacher
    return build(replace(teacher.config, image_size=image_size), teacher.state_dict(), 'the teacher')


def build_student(settings: dict, tokenizer: Tokenizer, task: str, teacher: BLIP | None = None) -> BLIP:
    """The net of the config's `model` block, initialised as it says.

    Raises:
        FileNotFoundError, ValueError: an initialisation is missing or does not fit.
    """
    config = architecture(settings['size'], settings['image_size'], len(tokenizer), task)
    model = BLIP(replace(config, dropout=settings['dropout']), settings['vit_ckpt_layer'])
    if settings['init']:
        checkpoint = read_checkpoint(settings['init'])
        if checkpoint.get('vocab', tokenizer.vocab) != tokenizer.vocab:
            raise ValueError(f'{settings["init"]} was trained with another vocabulary: use the same `tokenizer`')
        load_weights(model, checkpoint['model'], settings['init'])
    else:
        if settings.get('init_vision') == 'teacher':
            inherit_vision(model, need_teacher(teacher, 'init_vision'))
        elif settings.get('init_vision'):
            load_timm(model, settings['init_vision'])
        if settings.get('init_text') == 'teacher':
            inherit_text(model, need_teacher(teacher, 'init_text'))
        elif settings.get('init_text'):
            raise ValueError(f'model.init_text is {settings["init_text"]!r}: use teacher or null')
    logger.info('student %s at %d px: %.1fM parameters', settings['size'], settings['image_size'],
                count_parameters(model) / 1e6)
    return model


def need_teacher(teacher: BLIP | None, key: str) -> BLIP:
    if teacher is None:
        raise ValueError(f'model.{key} is teacher, but teacher.weights is null')
    return teacher


def load_timm(model: BLIP, name: str) -> None:
    """Start the vision tower from a timm VisionTransformer of the same size (hub name, cached or downloaded).

    Raises:
        FileNotFoundError: the weights are neither cached nor downloadable.
        ValueError: they do not fit the tower.
    """
    import timm
    try:
        pretrained = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f'cannot get the weights of model.init_vision {name!r} ({str(error).splitlines()[0][:100]}). Download them '
            f'once on a machine with a network, or set model.init_vision=null to start from scratch') from None
    weights, tower = pretrained.state_dict(), model.visual_encoder
    weights['pos_embed'] = resample_positions(weights['pos_embed'], tower.pos_embed)
    copy_weights(tower, weights, f'timm {name}')


def spaced(kept: int, depth: int) -> list[int]:
    """Indices of `kept` of `depth` teacher layers, evenly spaced from the first to the last (of one: the last)."""
    return [round(i * (depth - 1) / (kept - 1)) for i in range(kept)] if kept > 1 else [depth - 1]


def inherit_vision(model: BLIP, teacher: BLIP) -> None:
    """Copy evenly spaced ViT blocks, embeddings and projection of a teacher of equal width (TinyCLIP, DistilBERT)."""
    layers = spaced(model.config.vision_depth, teacher.config.vision_depth)
    weights = teacher.visual_encoder.state_dict()
    picked = {key: value for key, value in weights.items() if not key.startswith('blocks.')}
    for ours, theirs in enumerate(layers):
        prefix = f'blocks.{theirs}.'
        picked |= {f'blocks.{ours}.{key.removeprefix(prefix)}': value for key, value in weights.items()
                   if key.startswith(prefix)}
    picked['pos_embed'] = resample_positions(picked['pos_embed'], model.visual_encoder.pos_embed)
    copy_weights(model.visual_encoder, picked, 'the teacher (model.init_vision)')
    if model.text_encoder is not None and teacher.text_encoder is not None:
        copy_weights(model.vision_proj, teacher.vision_proj.state_dict(), 'the teacher (vision_proj)')


def keep_strongest_neurons(layer: dict[str, torch.Tensor], prefix: str, ffn: int) -> None:
    """Cut a text layer's feed-forward net to its `ffn` neurons of largest weight (norm in x norm out), in place."""
    into, bias, out = (f'{prefix}{name}' for name in ('intermediate.dense.weight', 'intermediate.dense.bias',
                                                      'output.dense.weight'))
    strength = layer[into].norm(dim=1) * layer[out].norm(dim=0)
    kept = strength.topk(min(ffn, len(strength))).indices.sort().values
    layer[into], layer[bias], layer[out] = layer[into][kept], layer[bias][kept], layer[out][:, kept]


def inherit_text(model: BLIP, teacher: BLIP) -> None:
    """Copy evenly spaced text layers, embeddings and heads of a teacher of equal width; a narrower feed-forward net
    keeps the strongest neurons."""
    layers = spaced(model.config.text_depth, teacher.config.text_depth)
    for name in ('text_encoder', 'text_decoder'):
        tower = getattr(model, name)
        if tower is None:
            continue
        if getattr(teacher, name) is None:
            raise ValueError(f'model.init_text is teacher, but a teacher of task {teacher.config.task!r} has no {name}')
        weights, prefix = getattr(teacher, name).state_dict(), 'bert.encoder.layer.' if name == 'text_decoder' \
            else 'encoder.layer.'
        picked = {key: value for key, value in weights.items() if not key.startswith(prefix)}
        for ours, theirs in enumerate(layers):
            picked |= {f'{prefix}{ours}.{key.removeprefix(f"{prefix}{theirs}.")}': value
                       for key, value in weights.items() if key.startswith(f'{prefix}{theirs}.')}
            keep_strongest_neurons(picked, f'{prefix}{ours}.', model.config.text_ffn)
        copy_weights(tower, picked, f'the teacher (model.init_text, {name})')
    if model.text_encoder is not None:
        for name in ('text_proj', 'itm_head'):
            copy_weights(getattr(model, name), getattr(teacher, name).state_dict(), f'the teacher ({name})')
        model.temp.data.copy_(teacher.temp.data)


def copy_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """A strict load whose error names the source."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        problems = ' '.join(line.strip() for line in lines[1:4])
        raise ValueError(f'{source} does not fit the student: {problems}') from None


def loss_weights(loss: dict[str, float], teacher: BLIP | None) -> dict[str, float]:
    """The config's weights; without a teacher its terms are off, which is said once."""
    if teacher is not None or not any(loss.get(term) for term in TEACHER_TERMS):
        return loss
    logger.info('teacher.weights is null: the distillation terms are off')
    return {term: 0.0 if term in TEACHER_TERMS else weight for term, weight in loss.items()}


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
