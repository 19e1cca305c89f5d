"""Where captions go: a file that grows, a table, or a text file beside each image."""

import csv
import io
import json
import os
from pathlib import Path

from data.folders import read_regular
from data.json_lines import JsonLines
from utils import FULL, atomic_write

COLUMNS = ('file_name', 'text', 'log_probability')


class Captions:
    """The captions of a run in a file, which the same run goes on with; a context that holds the right to write it.

    Args:
        path: .jsonl, .csv or .parquet.
    """

    def __init__(self, path: Path):
        self.path, self.is_table = path, path.suffix.lower() != '.jsonl'
        self.lines = JsonLines(path.with_name(f'{path.name}.jsonl') if self.is_table else path,
                               '--out')
        self.beside = path.with_name(f'{path.name}.settings.json')

    def resume(self, settings: dict, overwrite: bool) -> set[str]:
        """The real paths of the images that have a caption, however their folder was spelled; errors are dropped from
        the file, to be tried again.

        Raises:
            ValueError: the file holds something else, or captions made with other settings.
        """
        if overwrite:
            self.lines.replace([])
        if self.is_table and self.path.exists() and not self.lines.path.exists():
            raise ValueError(f'{self.path} is there and was not made by this command: name another --out, or replace '
                             f'it by --overwrite')
        try:
            records = list(self.lines.read())
            done = [record for record in records if 'error' not in record]
            paths = {os.path.realpath(record['path']) for record in done if record['caption'] is not None}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{self.lines.path} is there and holds something else than captions: name another '
                             f'--out') from None
        if records:
            try:
                written = json.loads(self.beside.read_text(encoding='utf-8'))
                other = [f'{name} {written.get(name)}, now {settings.get(name)}' for name in settings | written
                         if written.get(name) != settings.get(name)]
            except (OSError, ValueError, TypeError, AttributeError):
                other = [f'unknown settings, as {self.beside} is not there']
            if other:
                raise ValueError(f'{self.path} was made with other settings ({"; ".join(other)}): start over with '
                                 f'--overwrite, or name another --out')
        if len(done) < len(records):
            self.lines.replace(done)
        with atomic_write(self.beside) as file:
            json.dump(settings, file, indent=1)
        return paths

    def finish(self) -> None:
        """Write the table, if one was asked for."""
        if not self.is_table:
            return
        rows = [(record['path'], text, score) for record in self.lines.read() if 'error' not in record
                for text, score in zip(listed(record['caption']), listed(record['log_probability']), strict=True)]
        table = csv_table if self.path.suffix.lower() == '.csv' else parquet_table
        names = (inside(path, self.path.parent) for path, _, _ in rows)
        with atomic_write(self.path, 'wb') as file:
            file.write(table([(name, *row[1:]) for name, row in zip(names, rows, strict=True)]))


def listed(item) -> list:
    return item if isinstance(item, list) else [item]


def inside(path: str, folder: Path) -> str:
    """A path as seen from a folder, if it lies in it."""
    path, folder = os.path.abspath(path), os.path.join(os.path.abspath(folder), '')
    return path.removeprefix(folder)


def csv_table(rows: list[tuple]) -> bytes:
    text = io.StringIO(newline='')
    csv.writer(text, lineterminator='\n').writerows([COLUMNS, *rows])
    return text.getvalue().encode('utf-8', 'surrogateescape')


def parquet_table(rows: list[tuple]) -> bytes:
    import pyarrow
    from pyarrow import parquet
    names, texts, scores = zip(*rows, strict=True) if rows else ((), (), ())
    columns = [pyarrow.array(map(as_text, names), pyarrow.string()), pyarrow.array(texts, pyarrow.string()),
               pyarrow.array(scores, pyarrow.float32())]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns, COLUMNS), sink)
    return sink.getvalue().to_pybytes()


def as_text(name: str) -> str:
    """A file name, as a JSON string if it is not UTF-8."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return json.dumps(name)


# ---------------------------------------------------------------- a text file beside each image

def sidecar(image: str) -> str:
    return f'{os.path.splitext(image)[0]}.txt'


def write_sidecar(image: str, captions: list[str], existing: str) -> dict[str, str]:
    """Write the text file of an image, a caption a line, whole or not at all -> {image: error} if it cannot be.

    Args:
        existing: what becomes of a file that is there: 'skip' leaves it, 'overwrite' replaces it, 'append' adds the
            captions that are no lines of it.

    Raises:
        OSError: the disk is full.
    """
    path, before = Path(sidecar(image)), b''
    try:
        if os.path.lexists(path) and existing != 'overwrite':
            if existing == 'skip':
                return {}
            before = read_regular(path)
            before += b'\n' if before and not before.endswith(b'\n') else b''
        said = before.splitlines()
        new = [line for line in dict.fromkeys(caption.encode() for caption in captions) if line not in said]
        if new:
            with atomic_write(path, 'wb') as file:
                file.write(before + b'\n'.join(new) + b'\n')
    except (OSError, ValueError) as error:
        if getattr(error, 'errno', None) in FULL:
            raise
        return {image: f'{path} cannot be written: {getattr(error, "strerror", None) or error}'}
    return {}


def shared_sidecars(images: list[str]) -> dict[str, str]:
    """Image -> what is wrong with it, if its text file is that of an image before it, or an image."""
    taken, wrong = {image: image for image in images}, {}
    for image in images:
        other = taken.setdefault(sidecar(image), image)
        if other != image or sidecar(image) == image:
            wrong[image] = f'{image} shares {sidecar(image)} with {other}: rename one of them'
    return wrong
