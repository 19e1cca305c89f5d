"""faiss's index of embeddings: cells around k-means centres, 8 bits a number. faiss is optional."""

from pathlib import Path

import numpy as np

from data.distributed import progress
from utils import atomic_write, logger

CHUNK = 1 << 16  # rows added at once
PROBED = 1 / 16  # share of the cells that a query looks into


def faiss():
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import faiss
        return faiss
    except ImportError:
        raise ImportError('an approximate search needs the package: pip install faiss-cpu') from None


def build(features: np.ndarray):
    """An index of features [rows, D]."""
    cells = min(len(features), int(4 * len(features) ** 0.5))
    index = faiss().index_factory(features.shape[1], f'IVF{cells},SQ8', faiss().METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(len(features))[:64 * cells]
    index.train(np.array(features[np.sort(sample)]))
    for start in progress(range(0, len(features), CHUNK), desc='faiss'):
        index.add(np.array(features[start:start + CHUNK]))
    index.nprobe = max(1, int(cells * PROBED))
    return index


def read(path: Path, width: int):
    """What `write` wrote, or None if it is damaged."""
    try:
        index = faiss().read_index(str(path))
        if index.d != width:
            raise RuntimeError('another width')
    except (RuntimeError, MemoryError) as error:
        logger.warning('%s is damaged and made again: %s', path, str(error)[:120])
        return None
    index.nprobe = max(1, int(index.nlist * PROBED))
    return index


def write(path: Path, index) -> None:
    with atomic_write(path, 'wb') as file:
        file.write(faiss().serialize_index(index).tobytes())
