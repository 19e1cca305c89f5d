"""The state of a training run: what it saves, resumes and stops with. The loop itself is in each script."""

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
    """Everything a training run must keep, in `output_dir/last.pth`; a run found there is resumed.

    A step is an update of the optimizer. It takes `optim.grad_accum_steps` batches and gives what one batch of them all
    would, but for the negatives of ITM (`Objective.draw_negatives`); the last step of an epoch may have fewer.

    The randomness of a step is a function of (seed, batch, rank) and that of a batch one of (seed, epoch), so that a
    resumed run needs nothing but its position beside weights, optimizer, queues and meters. The checkpoints before the
    last (`train.keep_checkpoints` of them) stay beside it, and take its place should it be damaged.

    Args:
        objective: the module that is trained: it holds the `student`, and a frozen `teacher` or None.
        config: the script's settings (`optim` and `train` are read here).
        samples: of the training set.

    Attributes:
        model: the objective, whose gradients are averaged over the processes.
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
        """Batches trained on since the start of the run, on each process."""
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
        """Write the run's whole state to `last.pth`; all processes call it, the main one writes.

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
        """Write the student alone to `best.pth` if its score is the highest so far or, where that ties, its validation
        loss the lowest."""
        if (score, -loss) > self.best:
            self.best = score, -loss
            if is_main():
                save_checkpoint(self.output_dir / 'best.pth', self.student, self.tokenizer, self.config,
                                epoch=self.epoch, **extra)

    def _beside_student(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.objective.state_dict().items() if not key.startswith('student.')}

    def _resume(self) -> None:
        """Go on with the newest checkpoint, if there is one: with its state, and with the settings of the config.

        Raises:
            ValueError: it is of a run that cannot go on with these settings; names what differs.
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
        """The batches of each step that is left of this epoch, as an iterator of lists.

        After the first finished step there is something to save: until the block ends SIGTERM and SIGINT are then held
        back, and obeyed before the next batch.

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
        """Save and leave if a signal has come to any process; all ask at the same place, before a batch. The gradients
        of an unfinished step are forgotten."""
        if any_process(STOP.received):
            self.save()
            logger.info('stopped by a signal; the same command resumes from %s', self.output_dir / 'last.pth')
            raise SystemExit(0)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def exchange_gradients(self, now: bool) -> AbstractContextManager:
        """Within it, a backward pass averages the gradients over the processes; `now` False: it only adds to them."""
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
        """Whether this is one of every `every` steps of the epoch, or its last; 0: never."""
        return every > 0 and (self.epoch_done or self.step_in_epoch % every == 0)

    def log_interval(self) -> None:
        self.log.end_interval(self.epoch, self.step_in_epoch, self.steps_per_epoch, self.step,
                              self.batches_done / self.batches_per_epoch, self.lr)

    def end_epoch(self, validation: dict, samples: list[tuple[Path, str]] = ()) -> None:
        """Log the epoch, save, and go on to the next one.

        Args:
            validation: figures by name, which are logged as `val_NAME`.
            samples: (image, the student's caption) of a few held-out images, to be looked at.
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
