"""JSON lines that outlive a kill: appended record by record, by one process at a time."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout

from data.folders import open_regular
from utils import atomic_write, logger, make_output_dir

BLOCK = 10_000  # lines parsed at once
PATIENCE = 5  # seconds that are waited without a word


class JsonLines:
    """A file with one JSON object per line, which any number of processes may read while one appends to it.

    A line counts once its line break is written; what a kill left of a last line is dropped. Strings may hold any file
    name: bytes that are not UTF-8, which Python decodes to lone surrogates, are written as `\\udcXX` escapes, and
    `json.loads` gives the same name back.

    Args:
        called: what the user chose its folder by.
    """

    def __init__(self, path: str | os.PathLike, called: str = 'folder'):
        self.path, self.called = Path(path), called
        self._lock = FileLock(f'{path}.lock')  # released by the system when its process dies

    @contextmanager
    def writing(self, wait: bool = False) -> Iterator[None]:
        """Hold the right to write; a nested call of the same thread passes.

        Args:
            wait: until another process has ended, instead of raising.

        Raises:
            PermissionError: the folder cannot be made or written.
            ValueError: another process holds the right.
        """
        make_output_dir(self.path.parent, self.called)
        try:
            self._lock.acquire(timeout=PATIENCE if wait else 0)
        except Timeout:
            if not wait:
                raise ValueError(f'another process is writing {self.path}: let it finish, or name another file') \
                    from None
            logger.warning('waiting for another process, which is writing %s', self.path)
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def read(self) -> Iterator[dict]:
        """The records; an absent file has none.

        Raises:
            ValueError: it is no regular file, or a line is no JSON object.
        """
        if not self.path.exists():
            return
        with open_regular(self.path) as file:
            number = 0
            while lines := list(islice(file, BLOCK)):
                if not lines[-1].endswith(b'\n'):
                    lines.pop()
                try:
                    records = json.loads(b'[' + b','.join(lines) + b']')  # faster than line by line
                    if len(records) != len(lines) or not all(isinstance(record, dict) for record in records):
                        raise ValueError
                except (ValueError, RecursionError):
                    number += next(i for i, line in enumerate(lines, 1) if not is_object(line))
                    raise ValueError(f'{self.path}, line {number} is no JSON object') from None
                number += len(lines)
                yield from records

    def append(self, records: Iterable[dict]) -> None:
        """Write records that are on the disk when it returns; the right to write is held for it."""
        with self.writing(wait=True):
            if not self._ends_whole():
                self.replace(self.read())  # not cut in place: a reader may be on its way through the line
            with open(self.path, 'ab') as file:
                file.write(b''.join(map(encoded, records)))
                file.flush()
                os.fsync(file.fileno())

    def replace(self, records: Iterable[dict]) -> None:
        """Put another content in place of the file, whole or not at all; the right to write is held for it."""
        with self.writing(wait=True), atomic_write(self.path, 'wb') as file:
            file.writelines(map(encoded, records))

    def _ends_whole(self) -> bool:
        if not self.path.exists() or not self.path.stat().st_size:
            return True
        with open(self.path, 'rb') as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b'\n'


def encoded(record: dict) -> bytes:
    return json.dumps(record).encode() + b'\n'


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
