"""What may change when a run is resumed (it is logged) and what may not (it is refused by name)."""

from pathlib import Path

import torch

from configs import flatten, with_new_names
from models.blip import BLIPConfig
from models.distill.terms import asks_for_features
from utils import logger, shorten

FREE = ('dropout', 'vision_eps')  # of the architecture: no weight depends on them


def changed_settings(old: dict, new: dict) -> list[str]:
    """'KEY OLD -> NEW' of every setting that differs between two configs, given by dotted keys."""
    def shown(config: dict, key: str) -> str:
        return shorten(config[key]) if key in config else '(none)'
    return [f'{key} {shown(old, key)} -> {shown(new, key)}'
            for key in {**old, **new} if (key in old, old.get(key)) != (key in new, new.get(key))]


def compare(path: Path, state: dict, config: dict, **now) -> None:
    """Log the settings that differ from those of the checkpoint that a run resumes.

    Args:
        now: see `differences`.

    Raises:
        ValueError: something differs that cannot change within a run; names it and the settings.
    """
    before = dict(with_new_names(flatten(state['config']), shorten(path)))
    changed, differ = changed_settings(before, dict(flatten(config))), differences(state, **now)
    if 'momentum.teacher_image_queue' in now['kept'] and config['loss']['ita_soft']:
        if not asks_for_features(state['config']):
            differ.append("the queues of the teacher's features, which it never filled (loss.ita_soft was 0)")
        old, new = before.get('teacher.weights'), config['teacher']['weights']
        if old and new and old != new:
            differ.append(f'the teacher whose features its queues hold (teacher.weights {shorten(old)}, now '
                          f'{shorten(new)})')
    if differ:
        raise ValueError(f'{path} is of a run that differs in {", ".join(differ)}: resume it with its own settings or '
                         f'choose another --output_dir; its settings differ in {"; ".join(changed) or "nothing"}')
    for line in changed:
        logger.info('changed since %s: %s', path, line)


def differences(state: dict, *, seed: int, samples: int, architecture: BLIPConfig, vocab: list[str],
                trained: list[str], kept: dict[str, torch.Tensor]) -> list[str]:
    """What differs between a checkpoint and the current run that cannot change within a run.

    Args:
        state: the checkpoint; one of an earlier version has no `samples` and `trained`.
        samples: of the training set.
        trained: names of the parameters that the optimizer holds, in its order.
        kept: the objective's tensors besides the student's.
    """
    found = []
    if state['seed'] != seed:
        found.append(f'the seed ({state["seed"]}, now {seed})')
    before = state.get('samples')
    if before is None:  # at least the batches must come out the same
        batch = state['config']['train']['batch_size'] * state['world_size']
        before = samples if samples // batch == state['steps_per_epoch'] else state['steps_per_epoch'] * batch
    if before != samples:
        found.append(f'the number of training samples ({before}, now {samples})')
    net = architecture.to_dict()
    found += [f'{name} of the net ({value}, now {net.get(name)})' for name, value in state['architecture'].items()
              if name not in FREE and net.get(name) != value]
    if state['vocab'] != vocab:
        found.append(f'the vocabulary of the tokenizer ({len(state["vocab"])} tokens, now {len(vocab)})')
    theirs, ours = ({name: value.shape for name, value in part.items()} for part in (state['objective'], kept))
    others = [name for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)]
    others += sorted({*state.get('trained', trained)} ^ {*trained})
    if others:
        found.append(f'what it trains or keeps ({", ".join(others[:3])}{", ..." if len(others) > 3 else ""})')
    return found


def place_in_epoch(state: dict, batch_size: int, processes: int, samples: int) -> int:
    """The batch of its epoch at which a run resumes.

    The order of an epoch depends on the seed alone, so another number of processes resumes at the same place or, where
    none of its batches ends there, a little before it.

    Raises:
        ValueError: no batch ends there with another `train.batch_size`.
    """
    now, before = batch_size * processes, state['config']['train']['batch_size'] * state['world_size']
    steps = samples // now
    if state['batch'] == state['steps_per_epoch']:  # trained to its end
        return steps
    seen = state['batch'] * before
    batch, again = divmod(seen, now)
    old_size = state['config']['train']['batch_size']
    if again and batch_size != old_size:
        raise ValueError(f'train.batch_size {old_size} -> {batch_size}: the run stopped after {seen} samples of its '
                         f'epoch, where no batch of {batch_size} x {processes} processes ends. Finish the epoch with '
                         f'train.batch_size={old_size}, or choose another --output_dir')
    if steps != state['steps_per_epoch']:
        logger.info('%d processes and %d batches an epoch, before %d and %d: goes on at the same place of the epoch%s',
                    processes, steps, state['world_size'], state['steps_per_epoch'],
                    f', {again} samples of which it sees again' if again else '')
    return batch
