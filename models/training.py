"""One training run: optimizer, mixed precision, checkpoints and the step loop that all scripts share."""

import json
import math
from contextlib import nullcontext
from inspect import signature
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from data.loader import BadImages
from models.checkpoint import load_weights, read_checkpoint, save_checkpoint
from models.logs import Clock, Meters, append_log, plot_curves, read_log
from models.objective import Objective
from models.optim import learning_rate, parameter_groups
from models.tokenizer import Tokenizer
from utils import StopSignal, any_process, atomic_write, is_main, logger, rank, seed_everything, world_size


class Run:
    """Everything a training run must keep, in `output_dir/last.pth`; a run found there is resumed.

    Every step's randomness is a function of (seed, step, rank) and every batch one of (seed, epoch), so the
    position is all that a resumed run needs beside weights, optimizer, queues and meters.

    Args:
        objective: student, losses, momentum twin and teacher.
        config: the script's settings (`optim`, `train` and `ita` are read here).
        steps_per_epoch: batches an epoch on each process.
    """

    def __init__(self, objective: Objective, tokenizer: Tokenizer, config: dict, output_dir: Path,
                 device: torch.device, seed: int, steps_per_epoch: int):
        self.objective = objective.to(device)
        if objective.teacher is not None:
            objective.teacher.to(device)
        self.tokenizer, self.config, self.output_dir = tokenizer, config, output_dir
        self.device, self.seed, self.steps_per_epoch = device, seed, steps_per_epoch
        self.epoch = self.batch = 0  # the next batch to train on
        self.best = -math.inf
        self.meters, self.bad_images = Meters(), BadImages(config['data']['max_bad_share'], logger)
        self.optimizer = self._optimizer(config['optim'])
        self._resume()
        if config['train']['compile']:
            for net in (objective.student, objective.teacher):
                if net is not None:
                    net.visual_encoder.compile()
        self.parallel = self._parallel()
        self.writer = SummaryWriter(output_dir / 'tensorboard') if is_main() else None
        self.stop = StopSignal()

    @property
    def student(self):
        return self.objective.student

    def _optimizer(self, optim: dict) -> torch.optim.Optimizer:
        groups = parameter_groups(self.objective, optim['weight_decay'])
        if optim['shard']:
            if world_size() == 1:
                raise ValueError('optim.shard spreads the optimizer over processes: launch several, or set it to false')
            from fairscale.optim.oss import OSS
            return OSS(groups, optim=torch.optim.AdamW, lr=optim['lr'])
        return torch.optim.AdamW(groups, lr=optim['lr'], fused=self.device.type in ('cuda', 'cpu'))

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

    def save(self, name: str = 'last.pth', **extra) -> Path:
        """Write the run's whole state; all processes call it, the main one writes."""
        path = self.output_dir / name
        if self.config['optim']['shard']:
            self.optimizer.consolidate_state_dict(0)
        if is_main():
            rest = {key: value for key, value in self.objective.state_dict().items() if not key.startswith('student.')}
            save_checkpoint(path, self.student, self.tokenizer, self.config, objective=rest,
                            optimizer=self.optimizer.state_dict(), epoch=self.epoch, batch=self.batch, seed=self.seed,
                            best=self.best, meters=self.meters.state_dict(), world_size=world_size(), **extra)
        return path

    def save_best(self, **extra) -> None:
        """Write the student alone to `best.pth`."""
        if is_main():
            save_checkpoint(self.output_dir / 'best.pth', self.student, self.tokenizer, self.config, epoch=self.epoch,
                            **extra)

    def _resume(self) -> None:
        path = self.output_dir / 'last.pth'
        if not path.exists():
            return
        state = read_checkpoint(path, mmap=False)  # it becomes the optimizer's own
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
        if is_main():  # forget the logged steps that will be redone
            log, position = self.output_dir / 'steps.txt', self.epoch + self.batch / self.steps_per_epoch
            rows = [row for row in read_log(log) if row['progress'] <= position + 1e-9]
            with atomic_write(log) as file:
                file.writelines(json.dumps(row) + '\n' for row in rows)
        logger.info('resumed %s at epoch %d, batch %d of %d', path, self.epoch, self.batch, self.steps_per_epoch)

    # ------------------------------------------------------------ training

    def alpha(self, step: int) -> float:
        """Share of the momentum targets, ramped linearly over the first epochs."""
        ita = self.config.get('ita')
        if ita is None:
            return 0.0
        return ita['alpha'] * min(1.0, step / max(1, ita['alpha_ramp_epochs'] * self.steps_per_epoch))

    def train_one_epoch(self, loader, max_words_tokens: int, prompt: str = '') -> dict[str, float]:
        """Train from batch `self.batch` of epoch `self.epoch` to its end; returns the epoch's mean losses.

        Raises:
            FloatingPointError: a loss is not finite; names the step, the component and the samples.
            SystemExit: SIGTERM or SIGINT arrived; the state is saved first (exit code 0).
        """
        train, optim = self.config['train'], self.config['optim']
        accumulate, log_every = optim['accumulate'], train['log_every']
        last_step = self.steps_per_epoch * train['epochs']
        clock, interval, unchecked = Clock(last_step - self.epoch * self.steps_per_epoch - self.batch), Meters(), []
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=train['precision'] == 'bf16')
        self.parallel.train()
        for batch in loader:
            clock.data_ready()
            step = self.epoch * self.steps_per_epoch + self.batch
            self.bad_images.update(batch)
            lr = learning_rate(step, self.steps_per_epoch, train['epochs'], optim['lr'], optim['min_lr'],
                               optim['warmup_steps'], optim['warmup_lr'], optim['schedule'], optim['decay'])
            for group in self.optimizer.param_groups:
                group['lr'] = lr
            seed_everything(self.seed, step, rank())
            ids, mask = self.tokenizer([prompt + caption for caption in batch['caption']], max_words_tokens)
            inputs = [x.to(self.device, non_blocking=True) for x in (batch['image'], ids, mask, batch['id'])]
            boundary = (self.batch + 1) % accumulate == 0 or self.batch + 1 == self.steps_per_epoch
            with nullcontext() if boundary or world_size() == 1 else self.parallel.no_sync():
                with autocast:
                    losses = self.parallel(*inputs, self.alpha(step), self.seed * 1_000_003 + step)
                (losses['loss'] / accumulate).backward()
            unchecked.append((step, batch['id'], {name: value.detach() for name, value in losses.items()}))
            if self.device.type == 'cpu' or (self.batch + 1) % log_every == 0:
                self._check_finite(unchecked)  # on a GPU only now: looking at a loss waits for the device
            if boundary:
                torch.nn.utils.clip_grad_norm_(self.objective.parameters(), optim['clip_norm'] or math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                if self.objective.momentum is not None:
                    self.objective.momentum.update(self.student)
                if self.student.text_encoder is not None:
                    self.student.temp.data.clamp_(0.001, 0.5)
            values = {f'train_loss_{name}' if name != 'loss' else 'train_loss': value for name, value in losses.items()}
            self.meters.update(values)
            interval.update(values)
            self.batch += 1
            clock.step_done()
            if self.batch % log_every == 0 or self.batch == self.steps_per_epoch:
                self._check_finite(unchecked)
                self._log_interval(step, lr, interval.means(), clock, len(ids) * world_size())
                interval = Meters()
            looks = world_size() == 1 or self.batch % log_every == 0
            if looks and any_process(self.stop.received, self.device):
                self.save()
                logger.info('stopped by a signal; the same command resumes from %s', self.output_dir / 'last.pth')
                raise SystemExit(0)
            if train['save_every'] and self.batch % train['save_every'] == 0 and self.batch < self.steps_per_epoch:
                self.save()
        means = {'train_lr': lr, **self.meters.means()} if self.batch else {}
        self.epoch, self.batch, self.meters = self.epoch + 1, 0, Meters()
        return means

    def _check_finite(self, unchecked: list) -> None:
        for step, ids, losses in unchecked:
            bad = [name for name, value in losses.items() if not torch.isfinite(value)]
            if bad:
                raise FloatingPointError(
                    f'loss.{bad[0]} is {float(losses[bad[0]])} at step {step} (samples {ids.tolist()[:16]}); the last '
                    f'good state is in {self.output_dir}. Lower optim.lr, set optim.clip_norm, or use precision fp32.')
        unchecked.clear()

    def _log_interval(self, step: int, lr: float, means: dict, clock: Clock, samples: int) -> None:
        shown = '  '.join(f'{name.removeprefix("train_")} {value:.3f}' for name, value in means.items())
        logger.info('epoch %d [%d/%d]  lr %.2e  %s  %s', self.epoch, self.batch, self.steps_per_epoch, lr, shown,
                    clock.line(samples))
        if is_main():
            place = {'epoch': self.epoch, 'progress': (step + 1) / self.steps_per_epoch}
            append_log(self.output_dir / 'steps.txt', {**place, 'train_lr': lr, **means})
            for name, value in means.items():
                self.writer.add_scalar(name, value, step)
            self.writer.add_scalar('train_lr', lr, step)

    def end_epoch(self, stats: dict) -> None:
        """Append the epoch to `log.txt` (the original's keys), redraw the curves and save `last.pth`."""
        if is_main():
            append_log(self.output_dir / 'log.txt', {**stats, 'epoch': self.epoch - 1})
            for name, value in stats.items():
                if isinstance(value, int | float) and not name.startswith('train_'):
                    self.writer.add_scalar(name, value, self.epoch * self.steps_per_epoch)
            self.writer.flush()
            plot_curves([self.output_dir / 'steps.txt', self.output_dir / 'log.txt'], self.output_dir / 'curves.png')
        self.save()

    def finish(self, test: dict) -> None:
        """Append the test figures to `log.txt`, draw them, and print the table of the run."""
        if not is_main():
            return
        log = self.output_dir / 'log.txt'
        append_log(log, {**test, 'epoch': self.config['train']['epochs'] - 1})
        plot_curves([self.output_dir / 'steps.txt', log], self.output_dir / 'curves.png')
        columns = {key: value for row in read_log(log) for key, value in row.items() if isinstance(value, int | float)}
        width = max(map(len, columns))
        logger.info('last values of %s\n%s', log, '\n'.join(f'  {key:<{width}}  {value:.4g}'
                                                            for key, value in columns.items()))
