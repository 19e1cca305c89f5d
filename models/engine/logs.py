"""Parts of a run's logs: running means, throughput and ETA, JSON-lines files."""

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from data.distributed import gather_objects, is_main, rank, world_size
from data.json_lines import is_object
from utils import atomic_write


class Meters:
    """Running means of scalar tensors, kept on the device: nothing waits for the GPU until they are read."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: 0.0)
        self.counts: dict[str, int] = defaultdict(int)

    def update(self, values: dict[str, torch.Tensor | float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + (value.detach() if isinstance(value, torch.Tensor) else value)
            self.counts[name] += 1

    def clear(self) -> None:
        self.sums.clear()
        self.counts.clear()

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
        """The sums and counts of every process, in rank order; all processes must call it."""
        return gather_objects({name: (float(self.sums[name]), self.counts[name]) for name in self.sums})

    def load_state_dict(self, parts: list[dict]) -> None:
        """Each process takes its own part; if their number has changed, the first one takes all."""
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

    def step_done(self, samples: int) -> None:
        self.steps += 1
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


def append_log(path: Path, record: dict) -> None:
    """Append one JSON line (`log.txt`)."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')


def log_test(path: Path, record: dict) -> None:
    """Append the test figures to `log.txt`, in place of those of an earlier launch."""
    rewrite_log(path, lambda row: any(name.startswith('train_') for name in row))
    append_log(path, record)


def read_log(path: Path) -> list[dict]:
    """The records of a JSON-lines file, less what a crash has cut off or damaged; an absent file has none."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b'\n') and is_object(line)]


def forget_after(folder: Path, epoch: int, position: float) -> None:
    """Drop from a run's logs what a resumed run repeats: steps after `position`, epochs from `epoch` on."""
    for name in ('steps.txt', 'log.txt'):
        rewrite_log(folder / name, lambda row: (
            row['progress'] <= position + 1e-9 if 'progress' in row else row['epoch'] < epoch))


def rewrite_log(path: Path, wanted: Callable[[dict], bool]) -> None:
    rows = [json.dumps(row) + '\n' for row in read_log(path) if wanted(row)]
    with atomic_write(path) as file:
        file.writelines(rows)
