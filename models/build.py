"""Build student and teacher from a config. Order of a start, as every script does it: (1) the run's own
`last.pth` (models/training.py), (2) `model.init`, (3) `init_vision` / `init_text`, (4) scratch."""

from dataclasses import replace

import torch

from models.blip import BLIP
from models.checkpoint import architecture, build, load_weights, read_checkpoint, stored_config
from models.inherit import image_channels, inherit_text, inherit_vision, load_bert, load_timm, text_channels
from models.objective import Objective
from models.originals import momentum_state
from models.terms import TEACHER_TERMS, asks_for_features
from models.tokenizer import Tokenizer
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
    teacher = build(config, checkpoint['model'], path)
    logger.info('teacher %s: %.1fM parameters', path, count_parameters(teacher) / 1e6)
    return teacher


def at_resolution(teacher: BLIP, image_size: int) -> BLIP:
    """The teacher for pictures of another size: position embeddings resampled."""
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


def init_maps(objective: Objective, settings: dict, teacher: BLIP | None) -> None:
    """Start the maps to the teacher's width where the student starts, or they first pull it away from what it knows.

    After `model.init` they are those that its distillation had learned, where it holds any that fit; a narrower student
    that inherits from the teacher has each of its channels mapped to the one that it comes from.
    """
    maps = objective.maps
    if settings['init'] and maps:
        learned = read_checkpoint(settings['init']).get('objective', {})
        fitting = {name: learned[name] for name, value in maps.items()
                   if name in learned and learned[name].shape == value.shape}
        objective.load_state_dict(fitting, strict=False)
        logger.info("%d of %d parameters of the maps to the teacher's width from %s", len(fitting), len(maps),
                    settings['init'])
        return
    for tower, channels in (('vision', image_channels), ('text', text_channels)):
        if settings.get(f'init_{tower}') == 'teacher':
            kept = channels(objective.student, teacher)
            for name, value in maps.items():
                if (tower == 'vision') == name.startswith(('token_map.', 'hidden.vision')):
                    value.zero_()
                    if value.ndim == 2:
                        value[kept, torch.arange(len(kept))] = 1


def init_momentum(objective: Objective, config: dict) -> None:
    """Start momentum encoder and queues where `model.init` ended (a `last.pth`, or a file of BLIP or dlip-v2), if they
    fit: random queues would be trivial negatives for a good part of a finetune's first epoch. Logs what it found.

    The queues of a teacher are taken over from a run with the same `teacher.weights` only, that filled them.
    """
    source, momentum = config['model']['init'], objective.momentum
    if not source:
        return
    checkpoint, prefix = read_checkpoint(source), 'momentum.'
    held = {name.removeprefix(prefix): value for name, value in checkpoint.get('objective', {}).items()
            if name.startswith(prefix)} or momentum_state(checkpoint['model'])
    columns = ('image', 'text')
    if objective.uses('ita_soft'):
        columns += ('teacher_image', 'teacher_text')
        theirs = checkpoint.get('config') or {}
        if theirs.get('teacher', {}).get('weights') != config['teacher']['weights'] or not asks_for_features(theirs):
            held = {name: value for name, value in held.items() if not name.startswith('teacher')}
    encoder, entries = momentum.take_over(held, columns)
    lacking = 'absent (a last.pth has them, a best.pth has not) or of another size:'
    queues = f'taken over ({entries} newest entries)' if entries else f'{lacking} they start random'
    queues, start = queues if momentum.queue_size else 'off', f'{lacking} it starts as the student'
    logger.info('%s: momentum encoder %s; queues %s', source, 'taken over' if encoder else start, queues)


def need_teacher(teacher: BLIP | None, key: str) -> BLIP:
    if teacher is None:
        raise ValueError(f'model.{key} is teacher, but teacher.weights is null')
    return teacher


def loss_weights(loss: dict[str, float], teacher: BLIP | None) -> dict[str, float]:
    """The config's weights; without a teacher its terms are off, which is said once."""
    if teacher is not None or not any(loss.get(term) for term in TEACHER_TERMS):
        return loss
    logger.info('teacher.weights is null: the distillation terms are off')
    return {term: 0.0 if term in TEACHER_TERMS else weight for term, weight in loss.items()}


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
