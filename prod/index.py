"""An index of pictures on disk: their embeddings, memory-mapped, searched exactly by matrix products or through faiss.

A folder with `features.f32` (one row of float32 per picture), `pictures.txt` (one JSON string per row) and `index.json`
(the width, and the embedding of a test picture, which tells whose net wrote it). Rows are only ever appended: a run
that was cut off loses its last batch at most, and the next one goes on.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch

from utils import atomic_write, make_output_dir, progress

CHUNK = 1 << 16  # rows a matrix product
CANDIDATES = 20  # of faiss for every hit asked for; their exact cosines decide
PROBED = 1 / 16  # share of faiss's cells that a query looks into
GROWTH = 1.1  # faiss's file is made again when the index has outgrown it by this factor


class PictureIndex:
    """Open an index, or make an empty one.

    Args:
        folder: where it is or shall be.
        probe: embedding [D] of the test picture by the net in use.

    Raises:
        ValueError: it was written by another net, or is no index.
        PermissionError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike, probe: torch.Tensor):
        self.folder, self.width = Path(folder), len(probe)
        settings = self.folder / 'index.json'
        if not settings.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ValueError(f'{folder} is a folder of other files, not an index: name a new folder')
            make_output_dir(self.folder)
            with atomic_write(settings) as file:
                json.dump({'width': self.width, 'probe': probe.tolist()}, file)
        written = torch.tensor(json.loads(settings.read_text(encoding='utf-8'))['probe'])
        if written.shape != probe.shape or float(written @ probe) < 0.999:
            raise ValueError(f'the index {folder} was made with another checkpoint: delete it, or use that checkpoint')
        self._features, self._names = self.folder / 'features.f32', self.folder / 'pictures.txt'
        self.pictures: list[str] = []
        self._faiss = None
        self._known: set[str] = set()
        self._recover()

    def _recover(self) -> None:
        """Read the names; cut both files to the rows that are whole in both."""
        for path in (self._features, self._names):
            path.touch()
        lines = self._names.read_bytes().split(b'\n')[:-1]  # what follows the last line break is not whole
        rows = min(len(lines), self._features.stat().st_size // (4 * self.width))
        self.pictures = [json.loads(line) for line in lines[:rows]]
        self._known = set(self.pictures)
        for path, size in ((self._features, 4 * self.width * rows),
                           (self._names, sum(len(line) + 1 for line in lines[:rows]))):
            if path.stat().st_size > size:
                os.truncate(path, size)

    def __len__(self) -> int:
        return len(self.pictures)

    def __contains__(self, picture: str) -> bool:
        return picture in self._known

    def add(self, pictures: list[str], features: torch.Tensor) -> None:
        """Append pictures and their unit-norm embeddings [N, D]."""
        for path, content in ((self._features, features.float().cpu().contiguous().numpy().tobytes()),
                              (self._names, ''.join(f'{json.dumps(name)}\n' for name in pictures).encode())):
            with open(path, 'ab') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.pictures += pictures
        self._known.update(pictures)

    def search(self, query: torch.Tensor, k: int, *, approximate: bool = False) -> list[tuple[str, float]]:
        """The `k` pictures with the largest cosine to an embedding [D] -> [(picture, cosine)], best first.

        Args:
            approximate: look only at what faiss thinks near (it is trained at the first such search, and again as the
                index grows); the cosines are exact, a picture may be missed. Pays beyond about a million pictures.

        Raises:
            ValueError: the index is empty.
            ImportError: `approximate` without faiss.
        """
        if not self.pictures:
            raise ValueError(f'the index {self.folder} is empty: add pictures to it')
        query, k = query.float(), min(k, len(self))
        features = np.memmap(self._features, np.float32, 'r', shape=(len(self), self.width))
        if approximate:
            rows = torch.from_numpy(self._near(features, query, CANDIDATES * k))
            scores = torch.from_numpy(features[rows.numpy()]) @ query
        else:
            rows, scores = None, torch.empty(len(self))
            for start in range(0, len(self), CHUNK):
                scores[start:start + CHUNK] = torch.from_numpy(np.array(features[start:start + CHUNK])) @ query
        best = scores.topk(min(k, len(scores)))
        found = best.indices if rows is None else rows[best.indices]
        return [(self.pictures[row], score) for score, row in zip(best.values.tolist(), found.tolist(), strict=True)]

    def _near(self, features: np.ndarray, query: torch.Tensor, count: int) -> np.ndarray:
        """Rows near a query by faiss, and those that are newer than its file: [<= count + new]"""
        try:
            import faiss
        except ImportError:
            raise ImportError('an approximate search needs the package: pip install faiss-cpu') from None
        path = self.folder / 'faiss.ivf'
        if self._faiss is None and path.exists():
            self._faiss = faiss.read_index(str(path))
        if self._faiss is None or not len(self) / GROWTH <= self._faiss.ntotal <= len(self):
            cells = max(1, int(4 * len(self) ** 0.5))
            self._faiss = faiss.index_factory(self.width, f'IVF{cells},SQ8', faiss.METRIC_INNER_PRODUCT)
            sample = np.random.default_rng(0).permutation(len(self))[:64 * cells]
            self._faiss.train(np.array(features[np.sort(sample)]))
            for start in progress(range(0, len(self), CHUNK), desc='faiss'):
                self._faiss.add(np.array(features[start:start + CHUNK]))
            with atomic_write(path, 'wb') as file:
                file.write(faiss.serialize_index(self._faiss).tobytes())
        self._faiss.nprobe = max(1, int(self._faiss.nlist * PROBED))
        rows = self._faiss.search(query.numpy()[None], min(count, len(self)))[1][0]
        return np.concatenate([rows[rows >= 0], np.arange(self._faiss.ntotal, len(self))])
