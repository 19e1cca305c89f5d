"""One training run: optimizer, mixed precision, checkpoints and the step loop that all scripts share."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from data.loader import BadImages
from data.transforms import normalise
from models.distill.objective import Objective
from models.distill.terms import TERMS
from models.distill.update import MicroBatch
from models.engine.checkpoint_manager import Keeper
from models.engine.logs import Board, Clock, Meters, append_log, forget_after, log_test, memory_used, plot_curves
from models.engine.optim import build_optimizer, learning_rate, load_optimizer, parallel, set_lr, starts_pretrained
from models.engine.resume import compare, place_in_epoch
from models.engine.self_critical import SelfCritical
from models.engine.stopping import STOP
from models.linear import arithmetic
from models.tokenizer import Tokenizer
from models.weights.checkpoint import load_weights, save_checkpoint
from utils import any_process, barrier, is_main, logger, rank, seed_everything, shorten, to_device, world_size


class Run:
    """Everything a training run must keep, in `output_dir/last.pth`; a run found there is resumed.

    An update takes `optim.grad_accum_steps` batches and gives what one batch of them all would, but for ITM's negatives
    (`Objective.draw_negatives`). Learning rate, alpha and the contrastive columns are the update's.

    Every update's randomness is a function of (seed, update, rank) and every batch one of (seed, epoch), so the
    position is all that a resumed run needs beside weights, optimizer, queues and meters. The checkpoints before the
    last (`train.keep_checkpoints` of them) stay beside it, and take its place should it be damaged.

    Args:
        objective: student, losses, momentum twin and teacher; or, of the last stage of captioning, the student alone.
        config: the script's settings (`optim`, `train` and `ita` are read here).
        samples: of the training set.
    """

    def __init__(self, objective: Objective | SelfCritical, tokenizer: Tokenizer, config: dict, output_dir: Path,
                 device: torch.device, seed: int, samples: int):
        self.objective = objective.to(device)
        if objective.teacher is not None:
            objective.teacher.to(device)
        self.tokenizer, self.config, self.output_dir = tokenizer, config, output_dir
        self.device, self.seed, self.samples = device, seed, samples
        self.steps_per_epoch = samples // (config['train']['batch_size'] * world_size())  # on each process
        self.dtype = arithmetic(config['train']['precision'], device)  # of the autocast regions
        self.accumulate = config['optim']['grad_accum_steps']
        self.updates_per_epoch = -(-self.steps_per_epoch // self.accumulate)
        self.epoch = self.batch = 0  # the next batch to train on
        self.best = -math.inf, -math.inf  # score and negative validation loss
        self.keeper = Keeper(output_dir, config['train']['keep_checkpoints'])
        self.interval = Meters()  # since the last line of steps.txt
        self.unchecked: list[tuple[int, torch.Tensor, dict]] = []  # (step, ids, losses) not yet looked at
        self.meters, self.bad_images = Meters(), BadImages(config['data']['max_bad_fraction'], logger)
        self.optimizer = build_optimizer(self.objective, config['optim'], device,
                                         partial(starts_pretrained, settings=config['model']))
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        self.trained = [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group['params']]
        self._resume()
        if config['train']['compile']:
            for net in (objective.student, objective.teacher):
                if net is not None:
                    net.compile_towers()
        self.parallel = parallel(self.objective, device)
        self.board: Board | None = None
        self.listening = False

    @property
    def student(self):
        return self.objective.student

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the run's whole state to `last.pth`; all processes call it, the main one writes.

        Raises:
            FloatingPointError: a loss, a weight or the optimizer's state is not finite; nothing is written.
        """
        self._check_finite()
        if self.config['optim']['shard']:
            self.optimizer.consolidate_state_dict(0)
        meters, interval = self.meters.state_dict(), self.interval.state_dict()
        if is_main():
            state = {'objective': self._beside_student(), 'optimizer': self.optimizer.state_dict(),
                     'epoch': self.epoch, 'batch': self.batch, 'best': self.best, 'meters': meters,
                     'interval': interval, 'seed': self.seed, 'samples': self.samples, 'world_size': world_size(),
                     'steps_per_epoch': self.steps_per_epoch, 'trained': self.trained}
            self.keeper.replace(state, lambda path: save_checkpoint(path, self.student, self.tokenizer, self.config,
                                                                    **state))

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
        found = self.keeper.newest()
        if found is None:
            return
        path, state = found
        compare(path, state, self.config, seed=self.seed, samples=self.samples, architecture=self.student.config,
                vocab=self.tokenizer.vocab, trained=self.trained, kept=self._beside_student())
        load_weights(self.student, state['model'], str(path))
        self.objective.load_state_dict(state['objective'], strict=False)
        load_optimizer(self.optimizer, state['optimizer'])
        self.meters.load_state_dict(state['meters'])
        self.interval.load_state_dict(state['interval'])
        self.epoch, best = state['epoch'], state['best']
        self.best = best if isinstance(best, tuple) else (best, -math.inf)  # of an earlier version the score alone
        self.batch = place_in_epoch(state, self.config['train']['batch_size'], world_size(), self.samples)
        if state['steps_per_epoch'] != self.steps_per_epoch:
            self.interval = Meters()  # that of other batches
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
        STOP.listen(code=0)
        self.listening = True
        if not is_main():
            return
        self.keeper.sweep()
        done = self.epoch * self.steps_per_epoch + self.batch
        forget_after(self.output_dir, self.epoch, done / self.steps_per_epoch)
        self.board = Board(self.output_dir, self.config, done)

    def train_one_epoch(self, loader, max_tokens: int, prompt: str = '') -> dict[str, float]:
        """Train from batch `self.batch` of epoch `self.epoch` to its end and save; returns the epoch's mean losses.

        Of an epoch that was trained and not yet closed by `end_epoch` only the means are returned.

        Raises:
            FloatingPointError: a loss is not finite; names the step, the component and the samples.
            SystemExit: SIGTERM or SIGINT arrived (exit code 0); the state was saved, unless no step was made.
        """
        if not self.listening:
            self._open_logs()
        train = self.config['train']
        last_step = self.steps_per_epoch * train['epochs']
        clock = Clock(last_step - self.epoch * self.steps_per_epoch - self.batch)
        self.parallel.train()
        updates = self.updates(loader)
        with ExitStack() as held:  # from the first step on there is something to save
            while self.batch < self.steps_per_epoch:
                batches = STOP.unless_received(lambda: next(updates))
                clock.data_ready()
                self._leave_if_stopped()
                first, before = self.epoch * self.steps_per_epoch + self.batch, self.batch
                lr, losses = self.train_step(batches, first, max_tokens, prompt)
                self.unchecked.append((first, [text for batch in batches for text in batch['caption']], losses))
                at_end = before + len(batches) == self.steps_per_epoch
                log_due, save_due = (every and (at_end or (before + len(batches)) // every > before // every)
                                     for every in (train['log_every'], train['save_every']))
                if self.device.type == 'cpu' or log_due:
                    self._check_finite()  # on a GPU only now: looking at a loss waits for the device
                values = {f'train_loss_{name}' if name in TERMS else f'train_{name}': value
                          for name, value in (losses | self.update()).items()}
                self.batch += len(batches)
                self.meters.update(values)
                self.interval.update(values)
                clock.step_done(len(batches), len(batches) * len(batches[0]['id']) * world_size())
                if not STOP.held:
                    held.enter_context(STOP.hold())
                if log_due:
                    self._log_interval(first + len(batches), lr, clock)
                if at_end or save_due:
                    self.save()
        lr = max(group['lr'] for group in self.optimizer.param_groups)  # the last step's
        return {'train_lr': lr, **self.meters.means()}

    def _leave_if_stopped(self) -> None:
        """Save and leave if a signal has come to any process; all ask at the same place, before a batch."""
        if any_process(STOP.received):
            self.save()
            logger.info('stopped by a signal; the same command resumes from %s', self.output_dir / 'last.pth')
            raise SystemExit(0)

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
                           optim['warmup_steps'], optim['warmup_lr'], optim['lr_scheduler'], optim['lr_decay_rate'])
        set_lr(self.optimizer, lr, optim.get('pretrained_lr_scale', 1))
        seed_everything(self.seed, first, rank())
        parts, means = [self._inputs(batch, max_tokens, prompt) for batch in batches], {}
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with autocast:
            shared = self.objective.prepare(parts)
        for number, inputs in enumerate(parts):
            if number:  # an unfinished update is forgotten: it has changed nothing but gradients
                self._leave_if_stopped()
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
            stored = {name: to_device(x, self.device) for name, x in stored.items()}
        images, *rest = (to_device(x, self.device) for x in (batch['image'], ids, mask, batch['id']))
        return MicroBatch(normalise(images), *rest, lengths.tolist(), stored)

    def update(self) -> dict[str, torch.Tensor]:
        """One step of the optimizer and of the momentum encoder -> the gradient's norm before clipping, and the
        temperature of a student that has one."""
        most = self.config['optim']['clip_grad'] or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), most)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.objective.momentum is not None:
            self.objective.momentum.update(self.student)
        if self.student.text_encoder is None:
            return {'grad_norm': norm}
        return {'grad_norm': norm, 'temp': self.student.temp.data.clamp_(0.001, 0.5).clone()}

    def _check_finite(self) -> None:
        for step, captions, losses in self.unchecked:
            bad = [name for name, value in losses.items() if not torch.isfinite(value)]
            if bad:
                raise FloatingPointError(
                    f'loss.{bad[0]} is {float(losses[bad[0]])} at step {step} (captions {shorten(captions, 300)}); '
                    f'the last good state is in {self.output_dir}. Lower optim.lr, set optim.clip_grad, or '
                    f'use precision fp32.')
        self.unchecked.clear()

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
        """Append the epoch to `log.txt` (the original's keys), redraw the curves, save, and go on to the next one.

        Args:
            samples: (image, the student's caption) of a few held-out images, to be looked at.
        """
        if is_main():
            append_log(self.output_dir / 'log.txt', {**stats, 'epoch': self.epoch})
            step = (self.epoch + 1) * self.steps_per_epoch
            self.board.scalars({name: value for name, value in stats.items()
                                if isinstance(value, int | float) and not name.startswith('train_')}, step)
            if samples:
                self.board.pictures(samples, step)
            if self.epoch + 1 == self.config['train']['epochs']:
                self.board.close()
            plot_curves([self.output_dir / 'steps.txt', self.output_dir / 'log.txt'], self.output_dir / 'curves.png')
        with STOP.hold():
            self.epoch, self.batch, self.meters = self.epoch + 1, 0, Meters()
            self.save()

    def finish(self, test: dict) -> None:
        """Append the test figures to `log.txt` and draw them."""
        if is_main():
            log = self.output_dir / 'log.txt'
            log_test(log, {**test, 'epoch': self.config['train']['epochs'] - 1})
            plot_curves([self.output_dir / 'steps.txt', log], self.output_dir / 'curves.png')
