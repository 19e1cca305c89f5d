"""The state of a training run: saving, resuming and stopping. The training loop is in each script."""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from data.distributed import any_process, barrier, is_main, world_size
from models.engine.checkpoint_manager import CheckpointManager
from models.engine.logger import Logger
from models.engine.optim import build_optimizer, load_optimizer, parallel, starts_pretrained
from models.engine.resume import compare, place_in_epoch
from models.engine.stopping import STOP
from models.linear import arithmetic
from models.tokenizer import Tokenizer
from models.weights.checkpoint import load_weights, save_checkpoint
from utils import logger


class RunState:
    """Everything a training run saves to `output_dir/last.pth`; a run found there is resumed.

    A step is an update of the optimizer. It takes `optim.grad_accum_steps` batches (the last step of an epoch may have
    fewer) and equals a step on one batch of them all, except for ITM's negatives (`Objective.draw_negatives`).

    The random numbers of a step depend on (seed, batch, rank) and the data order on (seed, epoch). A resumed run thus
    needs only its position, besides weights, optimizer, queues and meters. The previous `train.keep_checkpoints`
    checkpoints are kept as well, in case the last one is damaged.

    Args:
        objective: the module to train; it holds the `student` and a frozen `teacher` or None.
        config: the script's settings (`optim` and `train` are read here).
        samples: of the training set.

    Attributes:
        model: the objective, wrapped so that gradients are averaged over the processes.
        epoch, batch: position in the data: the next batch to train on, on each process.
        best: (score, negative validation loss) of the best epoch so far.
    """

    def __init__(self, objective: nn.Module, tokenizer: Tokenizer, config: dict, output_dir: Path,
                 device: torch.device, seed: int, samples: int):
        self.objective = objective.to(device)
        if objective.teacher is not None:
            objective.teacher.to(device)
        train = config['train']
        self.tokenizer, self.config, self.output_dir = tokenizer, config, output_dir
        self.device, self.seed, self.samples = device, seed, samples
        self.batches_per_epoch = samples // (train['batch_size'] * world_size())
        self.accumulate = config['optim']['grad_accum_steps']
        self.steps_per_epoch = -(-self.batches_per_epoch // self.accumulate)
        self.dtype = arithmetic(train['precision'], device)  # of the autocast regions
        if objective.teacher is not None and device.type == 'cuda' and self.dtype == torch.bfloat16:
            objective.frozen.compute_in(self.dtype)
        self.epoch = self.batch = 0
        self.best = -math.inf, -math.inf
        self.checkpoints = CheckpointManager(output_dir, train['keep_checkpoints'])
        self.log = Logger(output_dir, config, device)
        self.optimizer = build_optimizer(self.objective, config['optim'], device,
                                         partial(starts_pretrained, settings=config['model']))
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        self.trained = [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group['params']]
        self._resume()
        if train['compile']:
            # beside the checkpoints, so that a resumed run does not compile again
            os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', str(output_dir / 'compiled'))
            objective.compile_parts(mode=None if train['compile'] is True else train['compile'])
        self.model = parallel(self.objective, device)
        self.started, self.held = False, ExitStack()
        logger.info('%d training samples; a step takes %d processes x batch %d x %d accumulated = %d of them; %d steps '
                    'x %d epochs', samples, world_size(), train['batch_size'], self.accumulate,
                    world_size() * train['batch_size'] * self.accumulate, self.steps_per_epoch, train['epochs'])

    @property
    def student(self) -> nn.Module:
        return self.objective.student

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    @property
    def batches_done(self) -> int:
        """Batches per process since the start of the run."""
        return self.epoch * self.batches_per_epoch + self.batch

    @property
    def step_in_epoch(self) -> int:
        """Steps made in this epoch."""
        return -(-self.batch // self.accumulate)

    @property
    def step(self) -> int:
        """Steps made since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    @property
    def epoch_done(self) -> bool:
        return self.batch == self.batches_per_epoch

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the whole state of the run to `last.pth`. All processes call it; the main one writes.

        Raises:
            FloatingPointError: a loss, a weight or the optimizer's state is not finite; nothing is written.
        """
        self.log.check_finite()
        if self.config['optim']['shard']:
            self.optimizer.consolidate_state_dict(0)
        meters, interval = self.log.meters.state_dict(), self.log.interval.state_dict()
        if is_main():  # 'steps_per_epoch' counts batches, as in the files of every version
            state = {'objective': self._beside_student(), 'optimizer': self.optimizer.state_dict(),
                     'epoch': self.epoch, 'batch': self.batch, 'best': self.best, 'meters': meters,
                     'interval': interval, 'seed': self.seed, 'samples': self.samples, 'world_size': world_size(),
                     'steps_per_epoch': self.batches_per_epoch, 'trained': self.trained}
            self.checkpoints.replace(state, lambda path: save_checkpoint(path, self.student, self.tokenizer,
                                                                         self.config, **state))

    def keep_best(self, score: float, loss: float, **extra) -> None:
        """Write the student alone to `best.pth` if its score is the highest so far; ties are broken by the validation
        loss."""
        if (score, -loss) > self.best:
            self.best = score, -loss
            if is_main():
                save_checkpoint(self.output_dir / 'best.pth', self.student, self.tokenizer, self.config,
                                epoch=self.epoch, **extra)

    def _beside_student(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.objective.state_dict().items() if not key.startswith('student.')}

    def _resume(self) -> None:
        """Resume the newest checkpoint, if there is one, with the settings of the config.

        Raises:
            ValueError: its run cannot be resumed with these settings; names what differs.
        """
        found = self.checkpoints.newest()
        if found is None:
            return
        path, state = found
        compare(path, state, self.config, seed=self.seed, samples=self.samples, architecture=self.student.config,
                vocab=self.tokenizer.vocab, trained=self.trained, kept=self._beside_student())
        load_weights(self.student, state['model'], str(path))
        self.objective.load_state_dict(state['objective'], strict=False)
        load_optimizer(self.optimizer, state['optimizer'])
        self.epoch, best = state['epoch'], state['best']
        self.best = best if isinstance(best, tuple) else (best, -math.inf)  # of an earlier version the score alone
        self.batch = place_in_epoch(state, self.config['train']['batch_size'], world_size(), self.samples)
        # another number of processes has other batches: the open interval starts again
        same_batches = state['steps_per_epoch'] == self.batches_per_epoch
        self.log.load_state_dict(state['meters'], state['interval'] if same_batches else [])
        logger.info('resumed %s at epoch %d, batch %d of %d', path, self.epoch, self.batch, self.batches_per_epoch)

    # ------------------------------------------------------------ the loop's frame

    @contextmanager
    def updates(self, loader) -> Iterator[Iterator[list[dict]]]:
        """An iterator over the remaining steps of this epoch; each item is the list of a step's batches.

        Once a step is finished there is something to save: from then on SIGTERM and SIGINT take effect before the next
        batch.

        Raises:
            SystemExit: one of them arrived (exit code 0); the state was saved, unless no step was made.
        """
        if not self.started:
            barrier()  # all have read the checkpoint
            STOP.listen(code=0)
            self.started = True
            if is_main():
                self.checkpoints.sweep()
                self.log.open(self.epoch, self.batches_done / self.batches_per_epoch, self.step)
        left = self.steps_per_epoch * self.config['train']['epochs'] - self.step
        self.log.start_clock(left, self.config['train']['batch_size'] * world_size())
        with ExitStack() as self.held:
            yield self._updates(loader)

    def _updates(self, loader) -> Iterator[list[dict]]:
        groups = in_groups(loader, self.accumulate)
        while not self.epoch_done:
            batches = STOP.unless_received(lambda: next(groups))
            self.log.clock.data_ready()
            self.leave_if_stopped()
            yield batches

    def leave_if_stopped(self) -> None:
        """Save and exit if any process has received a signal. All processes call it, before a batch; an unfinished step
        is discarded."""
        if any_process(STOP.received):
            self.save()
            logger.info('stopped by a signal; the same command resumes from %s', self.output_dir / 'last.pth')
            raise SystemExit(0)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def exchange_gradients(self, now: bool) -> AbstractContextManager:
        """A block whose backward pass averages the gradients over the processes or, if not `now`, only adds to them."""
        return nullcontext() if now or world_size() == 1 else self.model.no_sync()

    def step_done(self, batches: list[dict], losses: dict[str, torch.Tensor]) -> None:
        """Count a finished step.

        Raises:
            FloatingPointError: a loss is not finite (on a GPU only once it is logged or saved).
        """
        self.log.record(self.step, batches, losses)
        self.batch += len(batches)
        if not STOP.held:
            self.held.enter_context(STOP.hold())

    def is_due(self, every: int) -> bool:
        """True every `every` steps of the epoch and at its last step; never for 0."""
        return every > 0 and (self.epoch_done or self.step_in_epoch % every == 0)

    def log_interval(self) -> None:
        self.log.end_interval(self.epoch, self.step_in_epoch, self.steps_per_epoch, self.step,
                              self.batches_done / self.batches_per_epoch, self.lr)

    def end_epoch(self, validation: dict, samples: list[tuple[Path, str]] = ()) -> None:
        """Log the epoch, save, and start the next one.

        Args:
            validation: figures by name, which are logged as `val_NAME`.
            samples: (image, the student's caption) of a few held-out images, for `samples.png`.
        """
        stats = {'train_lr': self.lr, **self.log.meters.means()}
        stats |= {f'val_{name}': value for name, value in validation.items()}
        if is_main():
            last = self.epoch + 1 == self.config['train']['epochs']
            self.log.end_epoch(self.epoch, stats, samples, (self.epoch + 1) * self.steps_per_epoch, last)
        with STOP.hold():
            self.epoch, self.batch = self.epoch + 1, 0
            self.log.meters.clear()
            self.save()


def in_groups(loader, size: int) -> Iterator[list[dict]]:
    """The batches of a loader in lists of `size`; the last one may have fewer."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group
