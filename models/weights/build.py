"""Build student and teacher from a config. Order of a start, as every script does it: (1) the run's own
`last.pth` (models/engine/run_state.py), (2) `model.init`, (3) `init_vision` / `init_text`, (4) scratch."""

from dataclasses import replace

import torch

from configs import flatten
from configs.rules import net_relations
from models.blip import BLIP
from models.tokenizer import Tokenizer
from models.weights.checkpoint import architecture, build, load_weights, read_checkpoint, stored_config
from models.weights.inherit import inherit_text, inherit_vision, load_bert, load_timm
from utils import logger


def build_teacher(config: dict, tokenizer: Tokenizer, task: str) -> BLIP | None:
    """The frozen net of `teacher.weights`, of the size that the file says: a checkpoint of this repository or an
    original BLIP `.pth`.

    It has the parts of `task`, or, of a retrieval or caption checkpoint, those that the file holds: the terms that
    need no other still work (`Objective` names the ones that do not).

    Raises:
        ValueError: it was trained with another vocabulary, or cannot take the config's images or texts.
    """
    path = config['teacher']['weights']
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    net = stored_config(checkpoint, path)
    net = replace(net, task=task if net.task == 'pretrain' else net.task)
    if checkpoint.get('vocab', tokenizer.vocab) != tokenizer.vocab:
        raise ValueError(f'the teacher {path} was trained with another vocabulary ({len(checkpoint["vocab"])} '
                         f'tokens, `tokenizer` has {len(tokenizer)}): its logits cannot teach; use its vocabulary')
    settings = dict(flatten(config))
    for key, problem in net_relations(settings, net.to_dict(), f'the teacher {path}'):
        raise ValueError(f'{key} {problem}; got {settings[key]}')
    teacher = build(net, checkpoint['model'], path)
    logger.info('teacher %s: %.1fM parameters', path, count_parameters(teacher) / 1e6)
    return teacher


def at_resolution(teacher: BLIP, image_size: int) -> BLIP:
    """The teacher for images of another size: position embeddings resampled."""
    if teacher.config.image_size == image_size:
        return teacher
    return build(replace(teacher.config, image_size=image_size), teacher.state_dict(), 'the teacher', copy=False)


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
        layers = settings.get('init_layers')
        if settings.get('init_vision') == 'teacher':
            inherit_vision(model, need_teacher(teacher, 'init_vision'), layers)
        elif settings.get('init_vision'):
            load_timm(model, settings['init_vision'])
        if settings.get('init_text') == 'teacher':
            inherit_text(model, need_teacher(teacher, 'init_text'), layers)
        elif settings.get('init_text'):
            load_bert(model, settings['init_text'], tokenizer, layers)
    logger.info('student %s at %d px: %.1fM parameters', settings['size'], settings['image_size'],
                count_parameters(model) / 1e6)
    return model


def need_teacher(teacher: BLIP | None, key: str) -> BLIP:
    if teacher is None:
        raise ValueError(f'model.{key} is teacher, but teacher.weights is null')
    return teacher


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
