"""The checkpoints of a run: `last.pth`, and a few older ones to fall back on if it is damaged."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from models.weights.checkpoint import not_finite, read_checkpoint
from utils import TEMPORARY, logger

# Keys of a run's checkpoint besides the net's.
PARTS = ('objective', 'optimizer', 'config', 'seed', 'epoch', 'batch', 'steps_per_epoch', 'world_size', 'meters')


class CheckpointManager:
    """Args:
        folder: of the run.
        keep: older checkpoints to keep, as `epoch3_batch1000.pth`.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.last = folder / 'last.pth'
        self.later_name: str | None = None  # name that last.pth gets when a newer one replaces it

    def older(self) -> list[Path]:
        """The older checkpoints, newest first."""
        return sorted(self.folder.glob('epoch*_batch*.pth'), key=lambda path: -path.stat().st_mtime_ns)

    def newest(self) -> tuple[Path, dict] | None:
        """The newest checkpoint that can be read and holds no NaN; None if there are no checkpoints.

        Raises:
            ValueError: all of them are damaged, or one holds no run's state (such as a best.pth).
        """
        damaged = []
        for path in (self.last, *self.older()):
            try:
                state = read_checkpoint(path, mmap=False)  # it becomes the optimizer's own
                if bad := not_finite(state):
                    raise ValueError(f'{path} is not resumed: {bad[0]} is not finite')
            except FileNotFoundError:
                continue
            except ValueError as error:
                logger.warning('%s', error)
                damaged.append(str(path))
            else:
                lacking = [part for part in PARTS if part not in state]
                if lacking:
                    raise ValueError(f'{path} holds a net and not the state of a run ({lacking[0]} is missing): to '
                                     f'start from it, move it out of {self.folder} and set model.init to it')
                self.later_name = name_of(state) if path == self.last else None
                return path, state
        if damaged:
            raise ValueError(f'no checkpoint of the run in {self.folder} can be read ({", ".join(damaged)}): '
                             f'delete them to start again, or choose another --output_dir')
        return None

    def replace(self, state: dict, write: Callable[[Path], None]) -> None:
        """Write a new `last.pth`: whole, or not at all.

        Args:
            state: its `epoch`, `batch` and `steps_per_epoch`.

        Raises:
            OSError: it cannot be written; the previous checkpoint is intact.
        """
        if self.later_name and self.last.exists():
            older = self.folder / self.later_name
            older.unlink(missing_ok=True)
            try:
                os.link(self.last, older)
            except OSError:  # a file system without links
                shutil.copy2(self.last, older)
        try:
            write(self.last)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            raise OSError(f'cannot write {self.last} ({error}); the checkpoint before it is whole: make room on the '
                          f'disk and launch the same command again') from error
        self.later_name = name_of(state)
        for forgotten in self.older()[self.keep:]:  # only now: until here the second newest is last.pth itself
            forgotten.unlink()

    def sweep(self) -> None:
        """Delete files that killed processes left half-written."""
        for leftover in self.folder.glob(f'*{TEMPORARY}'):
            leftover.unlink()


def name_of(state: dict) -> str | None:
    """None at the end of an epoch: that checkpoint is not kept, since the one after the evaluation replaces it."""
    return None if state['batch'] == state['steps_per_epoch'] else f'epoch{state["epoch"]}_batch{state["batch"]}.pth'
