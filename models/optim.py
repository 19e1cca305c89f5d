"""Learning-rate schedules and the parameter groups of AdamW."""

import math

import torch


def learning_rate(step: int, steps_per_epoch: int, epochs: int, lr: float, min_lr: float, warmup_steps: int,
                  warmup_lr: float, schedule: str, decay: float) -> float:
    """Learning rate of an optimizer step: linear warm-up, then 'step' (lr * decay^epoch) or 'cosine' (to min_lr).

    'step' and 'cosine' are BLIP's `step_lr_schedule` and `cosine_lr_schedule`.
    """
    epoch = step // steps_per_epoch
    if schedule == 'step':
        value = max(min_lr, lr * decay ** epoch)
    else:
        done = step / max(1, steps_per_epoch * epochs)
        value = min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    if step < warmup_steps:
        value = min(value, warmup_lr + (lr - warmup_lr) * step / warmup_steps)
    return value


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: decay on matrices; none on biases, norms, the temperature and position embeddings."""
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bare = parameter.ndim < 2 or name.endswith(('pos_embed', 'cls_token', 'position_embeddings.weight'))
            (plain if bare else decay).append(parameter)
    return [{'params': decay, 'weight_decay': weight_decay}, {'params': plain, 'weight_decay': 0.0}]
