"""The logger of a training run."""

from pathlib import Path

import torch

from data.distributed import is_main
from data.loader import BadImages
from models.distill.terms import TERMS
from models.engine.curves import Board, plot_curves
from models.engine.logs import Clock, Meters, append_log, forget_after, log_test, memory_used
from utils import logger, shorten


class Logger:
    """Logs a line, `steps.txt` and TensorBoard scalars at each interval, `log.txt` and curves after each epoch.

    Attributes:
        meters: means of this epoch.
        interval: means since the last line of `steps.txt`.
    """

    def __init__(self, output_dir: Path, config: dict, device: torch.device):
        self.output_dir, self.config, self.device = output_dir, config, device
        self.meters, self.interval = Meters(), Meters()
        self.unchecked: list[tuple[int, list[str], dict]] = []  # (step, captions, losses) not yet checked
        self.bad_images = BadImages(config['data']['max_bad_fraction'], logger)
        self.board: Board | None = None

    def load_state_dict(self, meters: list[dict], interval: list[dict]) -> None:
        self.meters.load_state_dict(meters)
        self.interval.load_state_dict(interval)

    def open(self, epoch: int, progress: float, step: int) -> None:
        """Drop the logged steps and epochs that will be repeated, and start to log. The main process calls it."""
        forget_after(self.output_dir, epoch, progress)
        self.board = Board(self.output_dir, self.config, step)

    def start_clock(self, steps_left: int, samples: int) -> None:
        """Args:
            samples: of a batch, on all processes.
        """
        self.clock, self.batch_samples = Clock(steps_left), samples

    def record(self, step: int, batches: list[dict], losses: dict[str, torch.Tensor]) -> None:
        """Record a finished step. On a GPU its losses are checked later, in `check_finite`, which waits for them."""
        for batch in batches:
            self.bad_images.update(batch)
        self.unchecked.append((step, [text for batch in batches for text in batch['caption']], losses))
        if self.device.type == 'cpu':
            self.check_finite()
        values = {f'train_loss_{name}' if name in TERMS else f'train_{name}': value for name, value in losses.items()}
        self.meters.update(values)
        self.interval.update(values)
        self.clock.step_done(len(batches) * self.batch_samples)

    def check_finite(self) -> None:
        """Raises:
            FloatingPointError: a loss is not finite; names the step, the term and the samples.
        """
        for step, captions, losses in self.unchecked:
            bad = [name for name, value in losses.items() if not torch.isfinite(value)]
            if bad:
                raise FloatingPointError(
                    f'loss.{bad[0]} is {float(losses[bad[0]])} at step {step} (captions {shorten(captions, 300)}); '
                    f'the last good state is in {self.output_dir}. Lower optim.lr, set optim.clip_grad, or '
                    f'use precision fp32.')
        self.unchecked.clear()

    def end_interval(self, epoch: int, step_in_epoch: int, steps_per_epoch: int, step: int, progress: float, lr: float
                     ) -> None:
        """Log the means since the last interval; all processes call it.

        Args:
            progress: epochs trained so far, with the fraction.
        """
        self.check_finite()
        means, broken = self.interval.means(), self.bad_images.check()
        self.interval.clear()
        shown = '  '.join(f'{name.removeprefix("train_")} {value:.3f}' for name, value in means.items())
        logger.info('epoch %d [%d/%d]  lr %.2e  %s  %s%s', epoch, step_in_epoch, steps_per_epoch, lr, shown,
                    self.clock.line(), f'  broken: {broken}' if self.bad_images.kinds else '')
        if is_main():
            append_log(self.output_dir / 'steps.txt', {'epoch': epoch, 'progress': progress, 'train_lr': lr, **means})
            system = {'system_images_per_s': self.clock.rate(), 'system_data_wait': self.clock.waiting(),
                      'system_memory_GiB': memory_used(self.device)}
            self.board.scalars({'train_lr': lr, **means, **system}, step - 1)

    def end_epoch(self, epoch: int, stats: dict, samples: list[tuple[Path, str]], step: int, last: bool) -> None:
        """Append the epoch to `log.txt` (the original's keys) and redraw the curves. The main process calls it.

        Args:
            samples: (image, the student's caption), for `samples.png`.
        """
        append_log(self.output_dir / 'log.txt', {**stats, 'epoch': epoch})
        self.board.scalars({name: value for name, value in stats.items()
                            if isinstance(value, int | float) and not name.startswith('train_')}, step)
        if samples:
            self.board.images(samples, step)
        if last:
            self.board.close()
        self.plot()

    def finish(self, test: dict) -> None:
        """Log the figures of the test split as `test_NAME`, and draw them."""
        if is_main():
            log_test(self.output_dir / 'log.txt', {**{f'test_{name}': value for name, value in test.items()},
                                                   'epoch': self.config['train']['epochs'] - 1})
            self.plot()

    def plot(self) -> None:
        plot_curves([self.output_dir / 'steps.txt', self.output_dir / 'log.txt'], self.output_dir / 'curves.png')
