"""Folders that a run has for itself, what killed runs left in them, and files that can be read to their end."""

import argparse
import errno
import glob
import os
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from data.distributed import gather_objects, is_main
from utils import TEMPORARY, logger, make_output_dir

LOCK_WAIT = 10  # seconds that a run waits for the one before it, which may be about to end
DAY = 86400  # seconds
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # a file system that has none


@contextmanager
def locked(*folders: str | os.PathLike):
    """Keep other runs out of some folders during the block. All processes enter it; the main one holds the locks.

    The system takes a lock back when its holder ends, however it ends.

    Raises:
        ValueError: another run holds one of them, on every process.
    """
    locks, problem = [FileLock(Path(folder) / '.lock') for folder in folders], None
    if is_main():
        for folder, lock in zip(folders, locks, strict=True):
            try:
                lock.acquire(timeout=LOCK_WAIT)
            except Timeout:
                problem = (f'another run is writing to {folder}: wait for it or stop it, or choose another folder (if '
                           f'srun launched this one, its processes did not join: see models/README.md, "Several nodes '
                           f'and SLURM")')
                break
            except (OSError, NotImplementedError) as error:
                if getattr(error, 'errno', None) not in {None, *NO_LOCKS}:
                    raise
                logger.warning('%s is on a file system without locks: start no second run there', folder)
    try:
        problem = gather_objects(problem)[0]
        if problem:
            raise ValueError(problem)
        yield
    finally:
        for lock in locks:
            lock.release()


@contextmanager
def run_folder(args: argparse.Namespace, *inner: str):
    """The output folder of a training script's options, which is this run's alone during the block.

    `--dry_run` and `--store_teacher` write nothing there, leave no folder behind and take no lock.

    Args:
        inner: folders in it that are the run's as well.
    """
    new = not os.path.isdir(args.output_dir)
    folder = make_output_dir(args.output_dir)
    if args.dry_run or args.store_teacher is not None:
        try:
            yield folder
        finally:
            if new:
                with suppress(OSError):  # another process of this machine may be faster
                    folder.rmdir()
        return
    with locked(folder, *(make_output_dir(folder / name) for name in inner)):
        yield folder


def sweep(path: str | os.PathLike) -> None:
    """Delete what killed writers of `path` left behind: temporary files that nobody has written to for a day."""
    path = Path(path)
    for leftover in path.parent.glob(f'{glob.escape(path.name)}{TEMPORARY}'):
        with suppress(OSError):  # another process may sweep as well
            if time.time() - leftover.stat().st_mtime > DAY:
                leftover.unlink()


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a path for reading bytes.

    Raises:
        ValueError: it is a pipe, a socket, a device or a folder, from which reading might never return.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError('it is no regular file')
    return open(path, 'rb')


def read_regular(path: str | os.PathLike) -> bytes:
    """The content of a file; raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()
