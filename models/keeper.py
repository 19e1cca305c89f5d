"""The checkpoints of a run on disk: `last.pth`, and the few before it that take its place should it be damaged."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from models.checkpoint import read_checkpoint
from utils import logger


class Keeper:
    """Args:
        folder: of the run.
        keep: checkpoints before the last that stay, as `epoch3_batch1000.pth`.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.last = folder / 'last.pth'
        self.later_name: str | None = None  # what the last.pth on disk is called once a newer one has taken its place

    def older(self) -> list[Path]:
        """The checkpoints before the last, newest first."""
        return sorted(self.folder.glob('epoch*_batch*.pth'), key=lambda path: -path.stat().st_mtime_ns)

    def newest(self) -> tuple[Path, dict] | None:
        """The newest checkpoint that can be read; None where there is none at all.

        Raises:
            ValueError: there are some, and all are damaged.
        """
        damaged = []
        for path in (self.last, *self.older()):
            try:
                state = read_checkpoint(path, mmap=False)  # it becomes the optimizer's own
            except FileNotFoundError:
                continue
            except ValueError as error:
                logger.warning('%s', error)
                damaged.append(str(path))
            else:
                self.later_name = name_of(state) if path == self.last else None
                return path, state
        if damaged:
            raise ValueError(f'no checkpoint of the run in {self.folder} can be read ({", ".join(damaged)}): '
                             f'delete them to start again, or choose another --output_dir')
        return None

    def replace(self, state: dict, write: Callable[[Path], None]) -> None:
        """Write a new `last.pth`: whole, or not at all.

        Args:
            state: its `epoch` and `batch`.

        Raises:
            OSError: it cannot be written; the one before it is whole.
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
        """Delete what processes that were killed left half written."""
        for leftover in self.folder.glob('*.tmp*'):
            leftover.unlink()


def name_of(state: dict) -> str:
    return f'epoch{state["epoch"]}_batch{state["batch"]}.pth'
