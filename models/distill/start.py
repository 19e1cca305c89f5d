"""How a run starts what trains beside the student: loss weights, projections to the teacher's width, momentum encoder
and queues."""

import torch

from models.blip import BLIP
from models.distill.objective import Objective
from models.distill.terms import TEACHER_TERMS, asks_for_features
from models.weights.checkpoint import read_checkpoint
from models.weights.inherit import image_channels, text_channels
from models.weights.originals import momentum_state
from utils import logger


def loss_weights(loss: dict[str, float], teacher: BLIP | None) -> dict[str, float]:
    """The config's weights; without a teacher its terms are off, which is said once."""
    if teacher is not None or not any(loss.get(term) for term in TEACHER_TERMS):
        return loss
    logger.info('teacher.weights is null: the distillation terms are off')
    return {term: 0.0 if term in TEACHER_TERMS else weight for term, weight in loss.items()}


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
