"""What a run writes down while it trains: running means, rate and ETA, JSON-lines logs, and their curves."""

import json
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import torch

from utils import atomic_write, gather_objects


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
        local = {name: (float(self.sums[name]), self.counts[name]) for name in self.sums}
        total: dict[str, list[float]] = {}
        for part in gather_objects(local):
            for name, (value, count) in part.items():
                pair = total.setdefault(name, [0.0, 0])
                pair[0] += value
                pair[1] += count
        return {name: value / count for name, (value, count) in total.items()}

    def state_dict(self) -> dict:
        return {name: [float(self.sums[name]), self.counts[name]] for name in self.sums}

    def load_state_dict(self, state: dict) -> None:
        for name, (value, count) in state.items():
            self.sums[name], self.counts[name] = value, count


class Clock:
    """Step rate, share of time spent waiting for data, and ETA of a loop."""

    def __init__(self, steps_left: int):
        self.steps_left, self.steps, self.waited = steps_left, 0, 0.0
        self.started = self.mark = time.perf_counter()

    def data_ready(self) -> None:
        self.waited += time.perf_counter() - self.mark

    def step_done(self) -> None:
        self.steps += 1
        self.mark = time.perf_counter()

    def line(self, samples_per_step: int) -> str:
        elapsed = max(1e-9, time.perf_counter() - self.started)
        eta = timedelta(seconds=round(elapsed / max(1, self.steps) * (self.steps_left - self.steps)))
        return (f'{self.steps * samples_per_step / elapsed:.1f} images/s  data wait {self.waited / elapsed:.0%}  '
                f'eta {eta}')


def append_log(path: Path, record: dict) -> None:
    """Append one JSON line (`log.txt`)."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')


def read_log(path: Path) -> list[dict]:
    """The records of a JSON-lines file; an absent file has none."""
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []


def plot_curves(logs: list[Path], png: Path) -> None:
    """Draw every `train_*`, `val_*` and `test_*` number of JSON-lines logs over the epochs, one small panel each.

    A record's place is its `progress` (fractional epoch) or, at the end of an epoch, its `epoch` + 1; what is logged
    at both is drawn from the former; a single value is no curve.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
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
