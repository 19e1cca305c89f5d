"""An index of images on disk: their embeddings, memory-mapped, searched exactly by matrix products or through faiss.

A folder with `index.jsonl` and `features-ID.f32`. The first line of `index.jsonl` says which net made the index and
names the file of features; each other line is {"path", "row", "size", "mtime"}: the image's embedding is that row of
float32 numbers, the latest line of a path counts, and one without a row takes the path out. Rows are written before
the lines that name them and never change, so that an embedding cannot come under another name, whatever is cut off,
and readers neither write nor wait. Once most rows are of no further use, a new file of features takes the place of
the old one.
"""

import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

from data.distributed import progress
from data.json_lines import JsonLines
from prod import cells
from prod.arguments import checked
from prod.defaults import on_its_own_devices
from prod.images import find_images
from utils import atomic_write, logger, shorten, shown

CHUNK = 1 << 16  # rows copied at once
CANDIDATES = 20  # of faiss for every hit asked for; their exact cosines decide
GROWTH = 1.1  # faiss's file is made again when the index has outgrown it by this factor
UNUSED = 1000  # rows of no further use that are always tolerated


@on_its_own_devices
@checked
class ImageIndex:
    """Open an index, or make an empty one. What is opened stays as it was, whatever other processes add.

    Args:
        folder: where it is or shall be.
        probe: embedding [D] of the test image by the net in use.
        weight: the checkpoint of that net, by which a message calls it.

    Raises:
        ValueError: it was made with another net or by an earlier version, is damaged, or is no index.
        PermissionError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike, probe: torch.Tensor, weight: str = 'another checkpoint'):
        self.folder, self.width = Path(folder), len(probe)
        self._lines, self._probe = JsonLines(self.folder / 'index.jsonl', 'index folder'), probe.detach().float().cpu()
        if not self._lines.path.exists():
            files = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
            if {'index.json', 'pictures.txt'} <= {*files}:
                raise ValueError(f'the index {folder} was made by an earlier version of this code: delete it, and the '
                                 f'next run makes it again')
            if not all(name.startswith(('index.jsonl', 'features-')) for name in files):
                raise ValueError(f'{self.folder} is a folder of other files, not an index: name a new folder')
            with self._lines.writing(wait=True):
                if not self._lines.path.exists():  # another process may have been faster
                    self._header = {'width': self.width, 'probe': probe.tolist(), 'weight': weight}
                    self._paths, self._entries = [], {}
                    self._rewrite()
        self._load()

    @staticmethod
    def exists(folder: str | os.PathLike) -> bool:
        """Whether a folder holds an index."""
        return (Path(folder) / 'index.jsonl').exists()

    @property
    def images(self) -> list[str]:
        """The paths of the images."""
        return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, image: str) -> bool:
        return image in self._entries

    # ------------------------------------------------------------ reading

    def _load(self) -> None:
        """Read what the files hold now.

        Sets `_entries`: path -> (row, size, mtime); `_paths`: of each row, None where it is of no further use;
        `_features` [rows, D], mapped; and `_rows`, the number of rows that the lines speak of.
        """
        damaged = f'the index {self.folder} is damaged (%s): delete it, and the next run makes it again'
        while True:
            self._read, self._entries, self._paths, self._faiss = self._stamp(), {}, [], None
            try:
                lines = self._lines.read()
                self._header = next(lines, {})
                probe = torch.tensor(self._header['probe'], dtype=torch.float32, device='cpu')
                self._apply(lines)
                features = self.folder / self._header['features']
                if not re.fullmatch(r'features-\w+\.f32', features.relative_to(self.folder).as_posix()):
                    raise ValueError(f'its features are called {shorten(self._header["features"])}')
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(damaged % str(error)[:200]) from None
            if probe.shape != self._probe.shape or not float(probe @ self._probe) > 0.999:
                raise ValueError(f'the index {self.folder} was made with another checkpoint '
                                 f'({self._header.get("weight")}): delete it, or use that checkpoint')
            try:
                whole = features.stat().st_size // (4 * self.width)
                self._map(min(whole, len(self._paths)))
                break
            except FileNotFoundError:  # a new file may have taken its place while the lines were read
                if self._read == self._stamp():
                    raise ValueError(damaged % f'{features.name} is missing') from None
        self._rows = len(self._paths)
        if whole < self._rows:
            logger.warning('the index %s has lost the end of its features: the next run embeds those images again',
                           self.folder)
            for path in filter(None, self._paths[whole:]):
                del self._entries[path]
            del self._paths[whole:]

    def _apply(self, lines: Iterable[dict]) -> None:
        for line in lines:
            path, row = line['path'], line['row']
            if not isinstance(path, str):
                raise ValueError(f'the path {shorten(path)} is no text')
            if path in self._entries:
                self._paths[self._entries.pop(path)[0]] = None
            if row is not None:
                if row != len(self._paths):
                    raise ValueError(f'row {shorten(row)} in the place of {len(self._paths)}')
                self._paths.append(path)
                self._entries[path] = row, line['size'], line['mtime']

    def _map(self, rows: int) -> None:
        self._features = np.memmap(self.folder / self._header['features'], np.float32, 'r',
                                   shape=(rows, self.width)) if rows else np.empty((0, self.width), np.float32)

    def _stamp(self) -> tuple:
        """Changes with every change of the lines."""
        state = os.stat(self._lines.path)
        return state.st_ino, state.st_size, state.st_mtime_ns

    def search(self, query: torch.Tensor, k: int, *, approximate: bool = False) -> list[tuple[str, float]]:
        """The `k` images with the largest cosine to an embedding [D] -> [(path, cosine)], best first.

        Args:
            approximate: look only at what faiss thinks near (it is trained at the first such search, and again as the
                index grows); the cosines are exact, an image may be missed. Pays beyond about a million images.

        Raises:
            ValueError: the index is empty or damaged.
            ImportError: `approximate` without faiss.
        """
        if not self._entries:
            raise ValueError(f'the index {self.folder} is empty: add images to it')
        query, k, features = query.float().cpu(), min(k, len(self)), self._features
        if approximate:
            near = [row for row in self._near(features, query, CANDIDATES * k).tolist() if self._paths[row] is not None]
            rows = torch.tensor(near, dtype=torch.long, device='cpu')
            scores = torch.from_numpy(features[near]) @ query
        else:
            # numpy reads the mapped file where it is, torch would want a copy
            rows, scores = None, torch.from_numpy(np.dot(np.asarray(features), query.numpy()))
            if len(self) < len(features):
                scores[[row for row, path in enumerate(self._paths) if path is None]] = -torch.inf
        best, zero = scores.topk(min(k, len(scores))), (scores == 0).nonzero()[:, 0]
        zero = (zero if rows is None else rows[zero]).numpy()  # numpy takes one number of torch for a plain index
        lost = not features[zero].any(1).all()  # overwritten with zeros
        if lost or not (best.values.abs() <= 1.01 * query.norm()).all():
            raise ValueError(f'the index {self.folder} is damaged (its features are no embeddings): delete it, and the '
                             f'next run makes it again')
        found = best.indices if rows is None else rows[best.indices]
        return [(self._paths[row], score) for score, row in zip(best.values.tolist(), found.tolist(), strict=True)]

    def _near(self, features: np.ndarray, query: torch.Tensor, count: int) -> np.ndarray:
        """Rows near a query by faiss, and those that are newer than its file: [<= count + new]"""
        path = self.folder / Path(self._header['features']).with_suffix('.faiss')
        if self._faiss is None and path.exists():
            self._faiss = cells.read(path, self.width)
        if self._faiss is None or not len(features) / GROWTH <= self._faiss.ntotal <= len(features):
            self._faiss = cells.build(features)
            with suppress(PermissionError):  # a reader may not be allowed to
                cells.write(path, self._faiss)
        rows = self._faiss.search(query.numpy()[None], min(count, len(features)))[1][0]
        return np.concatenate([rows[rows >= 0], np.arange(self._faiss.ntotal, len(features))])

    # ------------------------------------------------------------ writing

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the only one who writes, and know what the others have written."""
        with self._lines.writing(wait=True):
            if self._read != self._stamp():
                self._load()
            if self._rows > len(self._paths) or self._rows > 2 * len(self) + UNUSED:
                self._rewrite()
                self._load()
            yield

    def _rewrite(self) -> None:
        """Write the rows in use to a new file, let the lines name it, and delete what they no longer name."""
        name = f'features-{uuid.uuid4().hex}.f32'
        paths = [path for path in self._paths if path is not None]
        rows = [self._entries[path][0] for path in paths]
        with atomic_write(self.folder / name, 'wb') as file:
            for start in range(0, len(rows), CHUNK):
                file.write(self._features[rows[start:start + CHUNK]].tobytes())
        self._lines.replace([self._header | {'features': name}, *(
            line(path, row, *self._entries[path][1:]) for row, path in enumerate(paths))])
        for path in self.folder.glob('features-*'):
            if path.stem != Path(name).stem:
                with suppress(OSError):  # Windows keeps what a reader has mapped
                    path.unlink()

    def add(self, images: list[str], features: torch.Tensor,
            stamps: list[tuple[int, int] | tuple[None, None]] | None = None) -> None:
        """Append images and their unit-norm embeddings [N, D]; a path that is known gets the new embedding.

        Args:
            stamps: size and time of change (ns) of each file, by which `update` sees that it changed.

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        if features.shape != (len(images), self.width):
            raise ValueError(f'{len(images)} images need features of {len(images)} x {self.width}, got '
                             f'{" x ".join(map(str, features.shape))}')
        if not features.isfinite().all():
            raise ValueError('the features hold NaN or infinite numbers')
        if not images:
            return
        with self._writing():
            with open(self.folder / self._header['features'], 'r+b') as file:
                file.seek(4 * self.width * self._rows)
                file.write(features.detach().float().cpu().contiguous().numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            self._append([line(path, row, *stamp) for row, (path, stamp) in enumerate(
                zip(images, stamps or [(None, None)] * len(images), strict=True), self._rows)])

    def remove(self, images: Iterable[str]) -> None:
        """Take images out; a path that is not in the index is passed over."""
        with self._writing():
            self._append([line(path) for path in images if path in self])

    def _append(self, lines: list[dict]) -> None:
        self._lines.append(lines)
        self._apply(lines)
        self._rows = len(self._paths)
        self._map(self._rows)
        self._read = self._stamp()

    def update(self, images: str | os.PathLike | list, embed: Callable[[list[str]], torch.Tensor],
               batch_size: int) -> None:
        """Bring the index up to date with a folder (and the folders in it) or a list of paths: embed new and changed
        images, take out those that are gone. Nothing is written where nothing changed.

        Args:
            embed: paths -> embeddings [N, D], rows of NaN for what is no readable image.
        """
        inside = os.path.join(os.path.realpath(images), '') if isinstance(images, str | os.PathLike) else None
        stamps = stamped(images if inside is None else find_images(images))
        if not any(self._changes(stamps, inside)):
            return
        with self._writing():
            fresh, gone = self._changes(stamps, inside)
            self.remove(gone)
            for start in progress(range(0, len(fresh), batch_size), desc='indexing'):
                batch = fresh[start:start + batch_size]
                features = embed(batch)
                good = features.isfinite().all(1).tolist()
                broken = [path for path, read in zip(batch, good, strict=True) if not read]
                for path in broken:
                    logger.warning('%s is no readable image: not in the index', shown(path))
                self.remove(broken)
                read = [path for path, read in zip(batch, good, strict=True) if read]
                self.add(read, features[good], [stamps[path] for path in read])

    def _changes(self, stamps: dict[str, tuple | None], inside: str | None) -> tuple[list[str], list[str]]:
        """The paths that are new or changed, and those of the same folders whose files are gone."""
        folders = {os.path.dirname(path) for path in stamps}
        fresh = [path for path, stamp in stamps.items() if stamp and self._entries.get(path, (0,))[1:] != stamp]
        gone = [path for path in self._entries if not stamps.get(path) and not os.path.isfile(path)
                and (os.path.dirname(path) in folders or inside and path.startswith(inside))]
        return fresh, gone


def line(path: str, row: int | None = None, size: int | None = None, mtime: int | None = None) -> dict:
    return {'path': path, 'row': row, 'size': size, 'mtime': mtime}


def stamped(paths: Iterable[str | os.PathLike]) -> dict[str, tuple[int, int] | None]:
    """The one real path of each file, however it is spelled -> its size and time of change (ns), None if it is gone.

    Raises:
        TypeError: one of them is no path.
    """
    real, stamps = cache(os.path.realpath), {}
    for path in paths:
        if not isinstance(path, str | bytes | os.PathLike):
            raise TypeError(f'images must be a folder or a list of paths, got {shorten(path)} among them')
        path = os.fsdecode(path)
        folder, name = os.path.split(path)
        path = os.path.join(real(folder), name)
        if os.path.islink(path):
            path = os.path.realpath(path)
        try:
            state = os.stat(path)
            stamps[path] = state.st_size, state.st_mtime_ns
        except OSError:
            logger.warning('%s is no readable image: not in the index', shown(path))
            stamps[path] = None
    return stamps
