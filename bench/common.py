"""What the benches share: code in a Python of its own, and sides that take turns."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable

from data.distributed import progress
from utils import ROOT


def fresh(code: str, *arguments):
    """Run code in a Python of its own -> what the JSON on the last line that it prints holds."""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, arguments)], cwd=ROOT, text=True,
                          check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(sides: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[float]]:
    """Medians of the numbers that each side returns; the sides are called in turn."""
    found = {name: [] for name in sides}
    for _ in progress(range(rounds), desc='rounds'):
        for name, side in sides.items():
            found[name].append(side())
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
