"""`--dry_run`: what a run of an objective will take, measured on a few of its steps."""

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.utils.data import DataLoader, IterableDataset

from data.distributed import local_world_size, world_size
from models.engine.logs import memory_used
from models.engine.run_state import RunState, in_groups
from models.weights.build import count_parameters
from utils import logger

STEPS = 3
LOADING = 1.0  # seconds for which items are loaded to measure their rate


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Within it, counts the bytes that forward passes keep for their backward passes, beside parameters and buffers.

    What is recomputed (`vit_ckpt_layer`) is not kept, and not counted.

    Attributes:
        bytes: so far; a storage counts once however many tensors view it.
    """

    def __init__(self, *nets: torch.nn.Module):
        self.seen = {tensor.untyped_storage().data_ptr() for net in nets for tensor in net.state_dict().values()}
        self.bytes = 0
        super().__init__(self.keep, lambda tensor: tensor)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it


def too_short(config: dict, pairs: int, updates: int) -> list[str]:
    """What of the `ita` settings does not fit the length of a run: warnings with their remedies.

    The limits lie between settings that learned and settings that did not, on photographs and on the demo
    (bench/photos.md). A student that starts aligned, from `model.init` or its teacher, bears a queue in a short run.

    Args:
        pairs: compared in one update, over all processes.
        updates: of the whole run.
    """
    ita, model, found = config['ita'], config['model'], []
    aligned = model['init'] or model.get('init_vision') == 'teacher'
    if not aligned and ita['queue_size'] > 0.05 * updates * pairs:
        found.append(f'ita.queue_size {ita["queue_size"]} holds the pairs of {ita["queue_size"] / pairs:.0f} of the '
                     f"run's {updates} updates: its keys age so quickly that age tells them from a batch's own, and "
                     f'alignment fails. Set it to 0 or train longer')
    if ita['momentum'] < 1 and 1 / (1 - ita['momentum']) > 0.5 * updates:
        found.append(f'ita.momentum {ita["momentum"]} averages over {1 / (1 - ita["momentum"]):.0f} updates and the '
                     f'run has {updates}: the momentum encoder stays near its start. Lower it or train longer')
    return found


def loading_rate(loader: DataLoader) -> float:
    """Items a second that one loading process makes, measured in this one on one core: decoding and augmentation."""
    data, threads = loader.dataset, torch.get_num_threads()
    items = iter(data) if isinstance(data, IterableDataset) else (
        data[row] for rows in loader.batch_sampler for row in rows)
    torch.set_num_threads(1)
    try:
        next(items)  # opens files
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < LOADING and next(items, None) is not None:
            count += 1
        return max(1, count) / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)


def loading(rate: float, wanted: float, workers: int, cores: int) -> str:
    """Whether `workers` loading processes keep up with training, and what to do if they do not.

    Args:
        rate: items a second of one of them.
        wanted: pairs a second that one training process takes.
        cores: of this machine, for each training process.
    """
    found = f'{rate:.0f} images/s a core x {max(1, workers)} workers, training takes {wanted:.0f}: '
    needed = math.ceil(1.2 * wanted / max(rate, 1e-9))  # a fifth more, as images differ in size
    if needed <= max(1, workers):
        return found + 'enough'
    if needed <= cores:
        return found + f'set data.num_workers={needed}'
    return found + (f'that needs {needed} cores and there are {cores}: set data.num_workers={cores}, and keep copies '
                    f'of the images at 256 px (img2dataset --image_size 256), in tars if they lie on a disk that seeks')


def dry_run(run: RunState, loader, train_step: Callable[[RunState, list[dict]], dict]) -> None:
    """Train a few steps, write nothing, and print parameters, batch arithmetic, hours, memory and disk.

    Args:
        train_step: the script's own, of a step's batches.

    Raises:
        ValueError: the disk has no room for the run's checkpoints.
    """
    train, nets = run.config['train'], run.objective
    before, seconds, saved = memory_used(run.device), [], SavedTensors(nets)
    run.model.train()
    for number, batches in zip(range(STEPS + 1), in_groups(loader, run.accumulate), strict=False):
        started = time.perf_counter()
        batches = batches if number else batches[:1]  # of one batch what it keeps: accumulated ones do not add to it
        with nullcontext() if number else saved:
            losses = train_step(run, batches)
        run.batch += len(batches)
        for batch in batches:
            run.log.bad_images.update(batch)
        losses['loss'].item()  # waits for the device
        seconds.append((time.perf_counter() - started) / len(batches))
    rate = statistics.median(seconds[1:] or seconds)
    samples, batches = train['batch_size'] * world_size(), run.batches_per_epoch * train['epochs']
    hours = rate * batches * world_size() / 3600  # on one device
    moments = [value for state in run.optimizer.state.values() for value in state.values() if hasattr(value, 'nbytes')]
    size = sum(value.nbytes for value in [*nets.state_dict().values(), *moments]) / 2 ** 30
    copies = train['keep_checkpoints'] + 3  # the last, the best and one that is being written
    free = shutil.disk_usage(run.output_dir).free / 2 ** 30
    parts = {'student': nets.student, 'momentum encoder': nets.momentum, 'teacher': nets.teacher}
    rows = {'parameters': ', '.join(f'{name} {count_parameters(net) / 1e6:.1f}M' for name, net in parts.items() if net),
            'a batch': f'{train["batch_size"]} x {world_size()} processes = {samples} pairs, a step takes '
                       f'{samples * run.accumulate}',
            'batches': f'{run.batches_per_epoch} x {train["epochs"]} epochs = {batches}',
            'first batch': f'{seconds[0]:.2f} s',
            'a batch after it': f'{rate:.2f} s ({samples / rate:.1f} pairs/s), loading not counted',
            'the whole run': f'{hours / world_size():.1f} hours without evaluation; on 1, 4 or 8 of this '
                             f'{run.device.type} {", ".join(f"{hours / count:.1f}" for count in (1, 4, 8))}',
            'loading': loading(loading_rate(loader), train['batch_size'] / rate, run.config['data']['num_workers'],
                               (os.cpu_count() or 1) // local_world_size()),
            'loss of the last one': f'{losses["loss"]:.3f}',
            'activations': f'{saved.bytes / 2 ** 30:.2f} GiB kept for the backward pass of a batch',
            'memory': f'{before:.2f} GiB before, {memory_used(run.device):.2f} GiB at most in a step',
            'disk': f'{copies} x {size:.2f} GiB of checkpoints at most, {free:.1f} GiB free',
            'broken images': run.log.bad_images.check()}
    if 'ita' in run.config:
        for warning in too_short(run.config, samples * run.accumulate, run.steps_per_epoch * train['epochs']):
            logger.warning('%s', warning)
    logger.info('dry run: nothing was written\n%s', '\n'.join(f'  {name:<22}{value}' for name, value in rows.items()))
    if free < copies * size:
        raise ValueError(f'{run.output_dir} has {free:.1f} GiB free, the run needs {copies * size:.1f}: make room, '
                         f'lower train.keep_checkpoints or choose another --output_dir')
