"""One training run: optimizer, mixed precision, checkpoints and the step loop that all scripts share."""

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from inspect import signature
from itertools import islice
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from data.loader import BadImages
from data.transforms import normalise
from models.checkpoint import load_weights, save_checkpoint
from models.keeper import Keeper
from models.logs import Board, Clock, Meters, append_log, memory_used, plot_curves, read_log
from models.objective import Objective
from models.optim import learning_rate, parameter_groups
from models.precision import arithmetic
from models.self_critical import SelfCritical
from models.tokenizer import Tokenizer
from models.update import MicroBatch
from utils import StopSignal, any_process, atomic_write, barrier, is_main, logger, rank, seed_everything, world_size

NAMES = {'loss': 'train_loss', 'reward': 'train_reward',  # in the logs; every other value is train_loss_NAME
         'acc_i2t': 'train_acc_i2t', 'acc_t2i': 'train_acc_t2i'}


class Run:
    """Everything a training run must keep, in `output_dir/last.pth`; a run found there is resumed.

    An update takes `optim.accumulate` batches and gives what one batch of them all would, but for the negatives of ITM
    (`Objective.draw_negatives`). Learning rate, alpha and the contrastive columns are the update's.

    Every update's randomness is a function of (seed, update, rank) and every batch one of (seed, epoch), so the
    position is all that a resumed run needs beside weights, optimizer, queues and meters. The `train.keep` checkpoints
    before the last stay beside it, and take its place should it be damaged.

    Args:
        objective: student, losses, momentum twin and teacher; or, of the last stage of captioning, the student alone.
        config: the script's settings (`optim`, `train` and `ita` are read here).
        steps_per_epoch: batches an epoch on each process.
    """

    def __init__(self, objective: Objective | SelfCritical, tokenizer: Tokenizer, config: dict, output_dir: Path,
                 device: torch.device, seed: int, steps_per_epoch: int):
        self.objective = objective.to(device)
        if objective.teacher is not None:
            objective.teacher.to(device)
        self.tokenizer, self.config, self.output_dir = tokenizer, config, output_dir
        self.device, self.seed, self.steps_per_epoch = device, seed, steps_per_epoch
        self.dtype = arithmetic(config['train']['precision'], device)  # of the autocast regions
        self.accumulate = config['optim']['accumulate']
        self.updates_per_epoch = -(-steps_per_epoch // self.accumulate)
        self.epoch = self.batch = 0  # the next batch to train on
        self.best = -math.inf
        self.keeper = Keeper(output_dir, config['train']['keep'])
        self.interval = Meters()  # since the last line of steps.txt
        self.meters, self.bad_images = Meters(), BadImages(config['data']['max_bad_share'], logger)
        self.optimizer = self._optimizer(config['optim'])
        self._resume()
        if config['train']['compile']:
            for net in (objective.student, objective.teacher):
                if net is not None:
                    net.compile_towers()
        self.parallel = self._parallel()
        self.board: Board | None = None
        self.stop: StopSignal | None = None

    @property
    def student(self):
        return self.objective.student

    def _optimizer(self, optim: dict) -> torch.optim.Optimizer:
        groups = parameter_groups(self.objective, optim['weight_decay'])
        settings = {'lr': optim['lr'], 'fused': self.device.type in ('cuda', 'cpu')}
        if optim['shard']:
            if world_size() == 1:
                raise ValueError('optim.shard spreads the optimizer over processes: launch several, or set it to false')
            from fairscale.optim.oss import OSS
            return OSS(groups, optim=torch.optim.AdamW, **settings)
        return torch.optim.AdamW(groups, **settings)

    def _parallel(self) -> torch.nn.Module:
        if world_size() == 1:
            return self.objective
        # The queues are equal on all ranks by construction; torch < 2.13 has one switch for both buffer syncs.
        name = 'forward_sync_buffers'
        if name not in signature(DistributedDataParallel).parameters:
            name = 'broadcast_buffers'
        return DistributedDataParallel(self.objective, gradient_as_bucket_view=True, **{name: False},
                                       device_ids=[self.device] if self.device.type == 'cuda' else None)

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the run's whole state to `last.pth`; all processes call it, the main one writes."""
        if self.config['optim']['shard']:
            self.optimizer.consolidate_state_dict(0)
        meters, interval = self.meters.state_dict(), self.interval.state_dict()
        if is_main():
            rest = {key: value for key, value in self.objective.state_dict().items() if not key.startswith('student.')}
            state = {'objective': rest, 'optimizer': self.optimizer.state_dict(), 'epoch': self.epoch,
                     'batch': self.batch, 'seed': self.seed, 'best': self.best, 'meters': meters, 'interval': interval,
                     'world_size': world_size(), 'steps_per_epoch': self.steps_per_epoch}
            self.keeper.replace(state, lambda path: save_checkpoint(path, self.student, self.tokenizer, self.config,
                                                                    **state))

    def save_best(self, **extra) -> None:
        """Write the student alone to `best.pth`."""
        if is_main():
            save_checkpoint(self.output_dir / 'best.pth', self.student, self.tokenizer, self.config, epoch=self.epoch,
                            **extra)

    def _resume(self) -> None:
        found = self.keeper.newest()
        if found is None:
            return
        path, state = found
        load_weights(self.student, state['model'], str(path))
        missing, unexpected = self.objective.load_state_dict(state['objective'], strict=False)
        missing = [key for key in missing if not key.startswith('student.')]
        if missing or unexpected or state['seed'] != self.seed:
            what = f'keys {missing + unexpected}' if missing or unexpected else f'the seed ({state["seed"]})'
            raise ValueError(f'{path} is of a run that differs in {what}: resume it with its own settings '
                             f'or choose another --output_dir')
        self.optimizer.load_state_dict(state['optimizer'])
        self.epoch, self.batch, self.best = state['epoch'], state['batch'], state['best']
        self.meters.load_state_dict(state['meters'])
        self.interval.load_state_dict(state['interval'])
        if state['steps_per_epoch'] != self.steps_per_epoch:  # other global batches: an epoch's order stays the same
            self.batch = self.batch * self.steps_per_epoch // state['steps_per_epoch']
            self.interval = Meters()
            logger.info('%d processes and %d batches an epoch, before %d and %d: goes on at the same place of the '
                        'epoch', world_size(), self.steps_per_epoch, state['world_size'], state['steps_per_epoch'])
        logger.info('resumed %s at epoch %d, batch %d of %d', path, self.epoch, self.batch, self.steps_per_epoch)

    # ------------------------------------------------------------ training

    def alpha(self, update: int) -> float:
        """Share of the momentum targets, ramped linearly over the first epochs."""
        ita = self.config.get('ita')
        if ita is None:
            return 0.0
        return ita['alpha'] * min(1.0, update / max(1, ita['alpha_ramp_epochs'] * self.updates_per_epoch))

    def updates(self, loader) -> Iterator[list[dict]]:
        """The batches of each update; an epoch's last one may have fewer."""
        batches = iter(loader)
        while group := list(islice(batches, self.accumulate)):
            yield group

    def _open_logs(self) -> None:
        """Forget the logged steps and epochs that will be redone, and what a killed process left; start to log."""
        barrier()  # all have read the checkpoint
        self.stop = StopSignal()
        if not is_main():
            return
        self.keeper.sweep()
        position = self.epoch + self.batch / self.steps_per_epoch
        for name in ('steps.txt', 'log.txt'):
            rows = [row for row in read_log(self.output_dir / name)
                    if row.get('progress', row['epoch'] + 1) <= position + 1e-9]
            with atomic_write(self.output_dir / name) as file:
                file.writelines(json.dumps(row) + '\n' for row in rows)
        self.board = Board(self.output_dir, self.config, round(position * self.steps_per_epoch))

    def train_one_epoch(self, loader, max_tokens: int, prompt: str = '') -> dict[str, float]:
        """Train from batch `self.batch` of epoch `self.epoch` to its end; returns the epoch's mean losses.

        Raises:
            FloatingPointError: a loss is not finite; names the step, the component and the samples.
            SystemExit: SIGTERM or SIGINT arrived; the state is saved first (exit code 0).
        """
        if self.stop is None:
            self._open_logs()
        train = self.config['train']
        last_step = self.steps_per_epoch * train['epochs']
        clock, unchecked = Clock(last_step - self.epoch * self.steps_per_epoch - self.batch), []
        self.parallel.train()
        for batches in self.updates(loader):
            clock.data_ready()
            first, before = self.epoch * self.steps_per_epoch + self.batch, self.batch
            lr, losses = self.train_step(batches, first, max_tokens, prompt)
            unchecked.append((first, torch.cat([batch['id'] for batch in batches]), losses))
            self.batch += len(batches)
            at_end = self.batch == self.steps_per_epoch
            log_due, save_due = (every and (at_end or self.batch // every > before // every)
                                 for every in (train['log_every'], train['save_every']))
            if self.device.type == 'cpu' or log_due:
                self._check_finite(unchecked)  # on a GPU only now: looking at a loss waits for the device
            self.update()
            values = {NAMES.get(name, f'train_loss_{name}'): value for name, value in losses.items()}
            self.meters.update(values)
            self.interval.update(values)
            clock.step_done(len(batches), len(batches) * len(batches[0]['id']) * world_size())
            if log_due:
                self._log_interval(first + len(batches), lr, clock)
            # Saved are whole updates only: gradients that were accumulated so far would be lost.
            if (world_size() == 1 or log_due) and any_process(self.stop.received, self.device):
                self.save()
                logger.info('stopped by a signal; the same command resumes from %s', self.output_dir / 'last.pth')
                raise SystemExit(0)
            if save_due and not at_end:
                self.save()
        means = {'train_lr': self.optimizer.param_groups[0]['lr'], **self.meters.means()}  # the last step's
        self.epoch, self.batch, self.meters = self.epoch + 1, 0, Meters()
        return means

    def train_step(self, batches: list[dict], first: int, max_tokens: int, prompt: str
                   ) -> tuple[float, dict[str, torch.Tensor]]:
        """Forward and backward of the batches of one update -> (learning rate, detached losses, their means).

        Args:
            first: number of the first batch, counted from the start of the run.
        """
        train, optim = self.config['train'], self.config['optim']
        epoch, batch = divmod(first, self.steps_per_epoch)
        update = epoch * self.updates_per_epoch + batch // self.accumulate
        lr = learning_rate(update, self.updates_per_epoch, train['epochs'], optim['lr'], optim['min_lr'],
                           optim['warmup_steps'], optim['warmup_lr'], optim['schedule'], optim['decay'])
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        seed_everything(self.seed, first, rank())
        parts, means = [self._inputs(batch, max_tokens, prompt) for batch in batches], {}
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with autocast:
            shared = self.objective.prepare(parts)
        for number, inputs in enumerate(parts):
            # Before the last batch the processes do not exchange any gradients.
            last = world_size() == 1 or number == len(parts) - 1
            with nullcontext() if last else self.parallel.no_sync():
                with autocast:
                    losses = self.parallel(*inputs[:4], self.alpha(update), self.seed * 1_000_003 + first + number,
                                           shared, number)
                (losses['loss'] / len(parts)).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + value.detach() / len(parts)
        return lr, means

    def _inputs(self, batch: dict, max_tokens: int, prompt: str) -> MicroBatch:
        """A batch on the device."""
        self.bad_images.update(batch)
        ids, mask = self.tokenizer([prompt + caption for caption in batch['caption']], max_tokens)
        lengths, stored = mask.sum(1), batch.get('targets')
        if stored is not None:
            if not torch.equal(stored['tokens'], lengths):
                raise ValueError('the stored targets are of captions of other lengths: store them again')
            stored = {name: x.to(self.device, non_blocking=True) for name, x in stored.items()}
        images, *rest = (x.to(self.device, non_blocking=True) for x in (batch['image'], ids, mask, batch['id']))
        return MicroBatch(normalise(images), *rest, lengths.tolist(), stored)

    def update(self) -> None:
        """One step of the optimizer and of the momentum twin."""
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config['optim']['clip_norm'] or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.objective.momentum is not None:
            self.objective.momentum.update(self.student)
        if self.student.text_encoder is not None:
            self.student.temp.data.clamp_(0.001, 0.5)

    def _check_finite(self, unchecked: list) -> None:
        for step, ids, losses in unchecked:
            bad = [name for name, value in losses.items() if not torch.isfinite(value)]
            if bad:
                raise FloatingPointError(
                    f'loss.{bad[0]} is {float(losses[bad[0]])} at step {step} (samples {ids.tolist()[:16]}); the last '
                    f'good state is in {self.output_dir}. Lower optim.lr, set optim.clip_norm, or use precision fp32.')
        unchecked.clear()

    def _log_interval(self, done: int, lr: float, clock: Clock) -> None:
        """Args:
            done: batches since the start of the run.
        """
        means, self.interval = self.interval.means(), Meters()
        broken = self.bad_images.check()
        shown = '  '.join(f'{name.removeprefix("train_")} {value:.3f}' for name, value in means.items())
        logger.info('epoch %d [%d/%d]  lr %.2e  %s  %s%s', self.epoch, self.batch, self.steps_per_epoch, lr, shown,
                    clock.line(), f'  broken: {broken}' if self.bad_images.kinds else '')
        if is_main():
            place = {'epoch': self.epoch, 'progress': done / self.steps_per_epoch}
            append_log(self.output_dir / 'steps.txt', {**place, 'train_lr': lr, **means})
            system = {'system_images_per_s': clock.rate(), 'system_data_wait': clock.waiting(),
                      'system_memory_GiB': memory_used(self.device)}
            self.board.scalars({'train_lr': lr, **means, **system}, done - 1)

    def end_epoch(self, stats: dict, samples: list[tuple[Path, str]] = ()) -> None:
        """Append the epoch to `log.txt` (the original's keys), redraw the curves and save `last.pth`.

        Args:
            samples: (picture, the student's caption) of a few held-out pictures, to be looked at.
        """
        if is_main():
            append_log(self.output_dir / 'log.txt', {**stats, 'epoch': self.epoch - 1})
            step = self.epoch * self.steps_per_epoch
            self.board.scalars({name: value for name, value in stats.items()
                                if isinstance(value, int | float) and not name.startswith('train_')}, step)
            if samples:
                self.board.pictures(samples, step)
            if self.epoch == self.config['train']['epochs']:
                self.board.close()
            plot_curves([self.output_dir / 'steps.txt', self.output_dir / 'log.txt'], self.output_dir / 'curves.png')
        self.save()

    def finish(self, test: dict) -> None:
        """Append the test figures to `log.txt` and draw them."""
        if is_main():
            log = self.output_dir / 'log.txt'
            append_log(log, {**test, 'epoch': self.config['train']['epochs'] - 1})
            plot_curves([self.output_dir / 'steps.txt', log], self.output_dir / 'curves.png')
