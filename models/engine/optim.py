"""The optimizer, its learning-rate schedules and parameter groups, and the exchange of gradients."""

import math
from collections.abc import Callable
from inspect import signature

import torch
from torch.nn.parallel import DistributedDataParallel

from data.distributed import world_size


def build_optimizer(model: torch.nn.Module, optim: dict, device: torch.device,
                    pretrained: Callable[[str], bool] = lambda name: False) -> torch.optim.Optimizer:
    """AdamW of the config's `optim` settings.

    Args:
        pretrained: whether a parameter, by its name, starts from published weights (see `parameter_groups`).

    Raises:
        ValueError: `optim.shard` with one process.
    """
    groups = parameter_groups(model, optim['weight_decay'], pretrained)
    settings = {'lr': optim['lr'], 'fused': device.type in ('cuda', 'cpu')}
    if optim['shard']:
        if world_size() == 1:
            raise ValueError('optim.shard spreads the optimizer over processes: launch several, or set it to false')
        from fairscale.optim.oss import OSS
        return OSS(groups, optim=torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a checkpoint's moments but keep the optimizer's own settings; the schedule sets the learning rate."""
    own = [{key: value for key, value in group.items() if key not in ('params', 'lr')}
           for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def parallel(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The module in DistributedDataParallel; on one process the module itself."""
    if world_size() == 1:
        return model
    # The queues are equal on all ranks by construction; torch < 2.13 has one switch for both buffer syncs.
    name = 'forward_sync_buffers'
    if name not in signature(DistributedDataParallel).parameters:
        name = 'broadcast_buffers'
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{name: False},
                                   device_ids=[device] if device.type == 'cuda' else None)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps_per_epoch: int, epochs: int, optim: dict
                      ) -> None:
    """Set the learning rate of a step, counted from the start of the run; parameters that start from published weights
    get it times `optim.pretrained_lr_scale`."""
    lr = learning_rate(step, steps_per_epoch, epochs, optim['lr'], optim['min_lr'], optim['warmup_steps'],
                       optim['warmup_lr'], optim['lr_scheduler'], optim['lr_decay_rate'])
    for group in optimizer.param_groups:
        group['lr'] = lr * (optim.get('pretrained_lr_scale', 1) if group['pretrained'] else 1)


def ramp(step: int, steps_per_epoch: int, value: float, epochs: float) -> float:
    """`value`, reached linearly over the first epochs."""
    return value * min(1.0, step / max(1, epochs * steps_per_epoch))


def learning_rate(step: int, steps_per_epoch: int, epochs: int, lr: float, min_lr: float, warmup_steps: int,
                  warmup_lr: float, schedule: str, decay: float) -> float:
    """Learning rate of a step: linear warm-up, then 'step' (lr * decay^epoch) or 'cosine' (to min_lr).

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


def parameter_groups(model: torch.nn.Module, weight_decay: float,
                     pretrained: Callable[[str], bool] = lambda name: False) -> list[dict]:
    """AdamW groups: weight decay on matrices; none on biases, norms, the temperature and position embeddings. Each
    group's `pretrained` says whether its parameters start from published weights (`optim.pretrained_lr_scale`)."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bare = parameter.ndim < 2 or name.endswith(('pos_embed', 'cls_token', 'position_embeddings.weight'))
            groups.setdefault((pretrained(name), bare), []).append(parameter)
    return [{'params': parameters, 'weight_decay': 0.0 if bare else weight_decay, 'pretrained': started}
            for (started, bare), parameters in sorted(groups.items())]


def starts_pretrained(name: str, settings: dict) -> bool:
    """Whether a parameter of `Objective` starts from `init_vision` or `init_text` of the `model` settings.

    The projections, the matching head and cross-attention never do, nor does anything after `init`.
    """
    if settings['init']:
        return False
    if name.startswith('student.visual_encoder.'):
        return settings.get('init_vision') not in (None, 'teacher')
    text = name.startswith(('student.text_encoder.', 'student.text_decoder.')) and 'crossattention' not in name
    return text and settings.get('init_text') not in (None, 'teacher')
