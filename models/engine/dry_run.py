"""`--dry_run`: what a run will take, measured on a few of its steps."""

import shutil
import statistics
import time
from contextlib import nullcontext

import torch

from models.engine.logs import memory_used
from models.engine.training import Run
from models.weights.build import count_parameters
from utils import logger, world_size

STEPS = 3


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


def rehearse(run: Run, loader, max_tokens: int, prompt: str = '') -> None:
    """Train a few steps, write nothing, and print parameters, batch arithmetic, hours, memory and disk.

    Raises:
        ValueError: the disk has no room for the run's checkpoints.
    """
    train, nets = run.config['train'], run.objective
    before, seconds, saved = memory_used(run.device), [], SavedTensors(nets)
    run.parallel.train()
    for number, batches in zip(range(STEPS + 1), run.updates(loader), strict=False):
        started = time.perf_counter()
        batches = batches if number else batches[:1]  # of one batch what it keeps: accumulated ones do not add to it
        with nullcontext() if number else saved:
            _, losses = run.train_step(batches, number * run.accumulate, max_tokens, prompt)
        run.update()
        losses['loss'].item()  # waits for the device
        seconds.append((time.perf_counter() - started) / len(batches))
    rate = statistics.median(seconds[1:] or seconds)
    samples, batches = train['batch_size'] * world_size(), run.steps_per_epoch * train['epochs']
    moments = [value for state in run.optimizer.state.values() for value in state.values() if hasattr(value, 'nbytes')]
    size = sum(value.nbytes for value in [*nets.state_dict().values(), *moments]) / 2 ** 30
    copies = train['keep_checkpoints'] + 3  # the last, the best and one that is being written
    free = shutil.disk_usage(run.output_dir).free / 2 ** 30
    parts = {'student': nets.student, 'momentum twin': nets.momentum, 'teacher': nets.teacher}
    rows = {'parameters': ', '.join(f'{name} {count_parameters(net) / 1e6:.1f}M' for name, net in parts.items() if net),
            'a batch': f'{train["batch_size"]} x {world_size()} processes = {samples} pairs, with an update every '
                       f'{samples * run.accumulate}',
            'batches': f'{run.steps_per_epoch} x {train["epochs"]} epochs = {batches}',
            'first batch': f'{seconds[0]:.2f} s',
            'a batch after it': f'{rate:.2f} s ({samples / rate:.1f} pairs/s), loading not counted',
            'the whole run': f'{rate * batches / 3600:.1f} hours without evaluation',
            'loss of the last one': f'{losses["loss"]:.3f}',
            'activations': f'{saved.bytes / 2 ** 30:.2f} GiB kept for the backward pass of a batch',
            'memory': f'{before:.2f} GiB before, {memory_used(run.device):.2f} GiB at most in a step',
            'disk': f'{copies} x {size:.2f} GiB of checkpoints at most, {free:.1f} GiB free',
            'broken pictures': run.bad_images.check()}
    logger.info('dry run: nothing was written\n%s', '\n'.join(f'  {name:<22}{value}' for name, value in rows.items()))
    if free < copies * size:
        raise ValueError(f'{run.output_dir} has {free:.1f} GiB free, the run needs {copies * size:.1f}: make room, '
                         f'lower train.keep_checkpoints or choose another --output_dir')
