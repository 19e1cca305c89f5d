"""What a run writes down while it trains: running means, rate and ETA, JSON-lines logs, their curves, TensorBoard."""

import hashlib
import json
import resource
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from data.images import open_image
from utils import atomic_write, gather_objects, is_main, rank, world_size


class Meters:
    """Running means of scalar tensors, kept on the device: nothing waits for the GPU until they are read."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: 0.0)
        self.counts: dict[str, int] = defaultdict(int)

    def update(self, values: dict[str, torch.Tensor | float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + (value.detach() if isinstance(value, torch.Tensor) else value)
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        """Mean over the updates and the processes."""
        total: dict[str, list[float]] = {}
        for part in self.state_dict():
            for name, (value, count) in part.items():
                pair = total.setdefault(name, [0.0, 0])
                pair[0] += value
                pair[1] += count
        return {name: value / count for name, (value, count) in total.items()}

    def state_dict(self) -> list[dict]:
        """The sums and counts of every process, in the order of their ranks; all of them must ask."""
        return gather_objects({name: (float(self.sums[name]), self.counts[name]) for name in self.sums})

    def load_state_dict(self, parts: list[dict]) -> None:
        """Each process takes its own part again; of another number of processes the first one takes all."""
        if len(parts) == world_size():
            parts = parts[rank():rank() + 1]
        elif not is_main():
            parts = []
        for part in parts:
            for name, (value, count) in part.items():
                self.sums[name] += value
                self.counts[name] += count


class Clock:
    """Rate, share of time spent waiting for data, and ETA of a loop."""

    def __init__(self, steps_left: int):
        self.steps_left, self.steps, self.samples, self.waited = steps_left, 0, 0, 0.0
        self.started = self.mark = time.perf_counter()

    def data_ready(self) -> None:
        self.waited += time.perf_counter() - self.mark

    def step_done(self, steps: int, samples: int) -> None:
        self.steps += steps
        self.samples += samples
        self.mark = time.perf_counter()

    def elapsed(self) -> float:
        return max(1e-9, time.perf_counter() - self.started)

    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.elapsed()

    def waiting(self) -> float:
        """Share of the time in which the loop waited for data."""
        return self.waited / self.elapsed()

    def line(self) -> str:
        eta = timedelta(seconds=round(self.elapsed() / max(1, self.steps) * (self.steps_left - self.steps)))
        return f'{self.rate():.1f} images/s  data wait {self.waiting():.0%}  eta {eta}'


def memory_used(device: torch.device) -> float:
    """Most memory that this process held so far, in GiB: of the GPU, or resident on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20)


class Board:
    """Where a run can be watched: TensorBoard, and Weights & Biases if `train.wandb_project` is set.

    Args:
        first_step: what was written after it, by a process that was killed, is hidden.

    Raises:
        ImportError: `train.wandb_project` without the package.
    """

    def __init__(self, output_dir: Path, config: dict, first_step: int):
        self.output_dir, self.wandb = output_dir, None
        self.writer = SummaryWriter(output_dir / 'tensorboard', purge_step=first_step)
        project = config['train']['wandb_project']
        if project:
            try:
                import wandb
            except ImportError:
                raise ImportError('train.wandb_project needs the package: pip install wandb') from None
            name = output_dir.resolve().name
            self.wandb = wandb.init(project=project, name=name, id=f'{name}-{config_hash(config)}', resume='allow',
                                    dir=output_dir, config=config)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        if self.wandb:
            self.wandb.log(values, step=step)

    def pictures(self, samples: list[tuple[Path, str]], step: int) -> None:
        """(picture, caption) side by side, also as `samples.png`."""
        figure = picture_grid(samples)
        with atomic_write(self.output_dir / 'samples.png', 'wb') as file:
            figure.savefig(file, dpi=110, format='png')
        if self.wandb:
            import wandb
            self.wandb.log({'samples': wandb.Image(str(self.output_dir / 'samples.png'))}, step=step)
        self.writer.add_figure('samples', figure, step)  # closes it
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
        if self.wandb:
            self.wandb.finish()


def config_hash(config: dict) -> str:
    return hashlib.sha1(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def picture_grid(samples: list[tuple[Path, str]], columns: int = 4):
    """A matplotlib figure of pictures with their captions."""
    plt = pyplot()
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(2.8 * columns, 2.9 * rows))
    for axis in axes.flat:
        axis.axis('off')
    for axis, (path, caption) in zip(axes.flat, samples, strict=False):
        image = open_image(path)
        image.thumbnail((512, 512))
        axis.imshow(image)
        axis.set_title(textwrap.fill(caption, 34), fontsize=8)
    figure.tight_layout()
    return figure


def pyplot():
    """matplotlib without a screen."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


def append_log(path: Path, record: dict) -> None:
    """Append one JSON line (`log.txt`)."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')


def log_test(path: Path, record: dict) -> None:
    """Append the test figures to `log.txt`, in place of those of an earlier launch."""
    rewrite_log(path, lambda row: any(name.startswith('train_') for name in row))
    append_log(path, record)


def read_log(path: Path) -> list[dict]:
    """The records of a JSON-lines file, less a last line that was cut off; an absent file has none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines(keepends=True)
            if line.endswith('\n')]


def forget_after(folder: Path, epoch: int, position: float) -> None:
    """Drop from a run's logs what a resumed run will do again: steps after `position`, epochs from `epoch` on."""
    for name in ('steps.txt', 'log.txt'):
        rewrite_log(folder / name, lambda row: (
            row['progress'] <= position + 1e-9 if 'progress' in row else row['epoch'] < epoch))


def rewrite_log(path: Path, wanted: Callable[[dict], bool]) -> None:
    rows = [json.dumps(row) + '\n' for row in read_log(path) if wanted(row)]
    with atomic_write(path) as file:
        file.writelines(rows)


def plot_curves(logs: list[Path], png: Path) -> None:
    """Draw every `train_*`, `val_*` and `test_*` number of JSON-lines logs over the epochs, one small panel each.

    A record's place is its `progress` (fractional epoch) or, at the end of an epoch, its `epoch` + 1; what is logged
    at both is drawn from the former; a single value is no curve.
    """
    plt = pyplot()
    series: dict[str, list[tuple[float, float]]] = {}
    rows = [row for log in logs for row in read_log(log)]
    finer = {name for row in rows if 'progress' in row for name in row}  # of these the epochs' means would be spikes
    for row in rows:
        for name, value in row.items():
            if name.startswith(('train_', 'val_', 'test_')) and isinstance(value, int | float) and (
                    'progress' in row or name not in finer):
                series.setdefault(name, []).append((row.get('progress', row['epoch'] + 1), value))
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return
    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(3.2 * columns, 2.3 * rows))
    for axis in axes.flat[len(series):]:
        axis.axis('off')
    for axis, (name, points) in zip(axes.flat, series.items(), strict=False):
        axis.plot(*zip(*sorted(points), strict=True), marker='.', markersize=3, linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.supxlabel('epoch', fontsize=8)
    figure.tight_layout()
    with atomic_write(png, 'wb') as file:
        figure.savefig(file, dpi=110, format='png')
    plt.close(figure)
