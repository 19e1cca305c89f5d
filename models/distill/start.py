"""Builds a script's objective: loss weights, momentum encoder and queues, projections to the teacher's width."""

import torch

from models.blip import BLIP
from models.distill.objective import Objective
from models.distill.teacher import StoredTeacher
from models.distill.terms import TEACHER_TERMS, asks_for_features
from models.momentum import MomentumQueue
from models.tokenizer import Tokenizer
from models.weights.checkpoint import read_checkpoint
from models.weights.inherit import image_channels, text_channels
from models.weights.originals import momentum_state
from utils import logger


def build_objective(config: dict, student: BLIP, tokenizer: Tokenizer, source: BLIP | StoredTeacher | None,
                    teacher: BLIP | None, prompt_length: int = 0) -> Objective:
    """The objective of a script's config; with a block `ita` it has a momentum encoder and queues.

    Args:
        source: of the teacher's answers: the net, or the stored targets that stand for it.
        teacher: the net of `teacher.weights`, which the student may have started from.
        prompt_length: leading decoder tokens that carry no LM loss.
    """
    momentum, ita = None, config.get('ita')
    if ita:
        momentum = MomentumQueue(student, ita['queue_size'], ita['momentum'], source.config.embed_dim if source else 0)
    objective = Objective(student, loss_weights(config['loss'], source),
                          (tokenizer.cls_id, tokenizer.enc_id, tokenizer.bos_id), momentum, source, prompt_length,
                          config.get('negative_all_rank', False), config['hidden_layers'])
    init_projections(objective, config['model'], teacher)
    if momentum:
        init_momentum(objective, config)
    return objective


def loss_weights(loss: dict[str, float], teacher: BLIP | None) -> dict[str, float]:
    """The config's weights; without a teacher its terms are off, which is logged."""
    if teacher is not None or not any(loss.get(term) for term in TEACHER_TERMS):
        return loss
    logger.info('teacher.weights is null: the distillation terms are off')
    return {term: 0.0 if term in TEACHER_TERMS else weight for term, weight in loss.items()}


def init_projections(objective: Objective, settings: dict, teacher: BLIP | None) -> None:
    """Initialise the projections to the teacher's width to match the student; random ones would first pull it away from
    what it knows.

    With `model.init` they are loaded from that file, as far as it holds any that fit. For a narrower student that
    inherits from the teacher, each channel is projected to the teacher's channel that it comes from.
    """
    projections = objective.projections
    if settings['init'] and projections:
        learned = read_checkpoint(settings['init']).get('objective', {})
        fitting = {name: learned[name] for name, value in projections.items()
                   if name in learned and learned[name].shape == value.shape}
        objective.load_state_dict(fitting, strict=False)
        logger.info("%d of %d parameters of the projections to the teacher's width from %s", len(fitting),
                    len(projections), settings['init'])
        return
    for tower, channels in (('vision', image_channels), ('text', text_channels)):
        if settings.get(f'init_{tower}') == 'teacher':
            kept = channels(objective.student, teacher)
            for name, value in projections.items():
                if (tower == 'vision') == name.startswith(('token_proj.', 'hidden.vision')):
                    value.zero_()
                    if value.ndim == 2:
                        value[kept, torch.arange(len(kept))] = 1


def init_momentum(objective: Objective, config: dict) -> None:
    """Load momentum encoder and queues from `model.init` (a `last.pth`, or a file of BLIP or dlip-v2) if they fit, and
    log what was found: random queues would be trivial negatives for much of a finetune's first epoch.

    A teacher's queues are loaded only if they were filled with the same `teacher.weights`.
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
