"""Searching an index of many images beside faiss alone: how fast it is built, opened and searched, and its memory.

    python -m bench.search --images 100000 1000000

Random unit vectors of 256 numbers around 1,000 centres; one query at a time, medians. Each side runs in a process of
its own. Memory is what the process holds after its queries beyond what it held before: its own (anonymous) pages, and
beside them the pages of mapped files, which the system takes back when it needs them. Recall is the share of the exact
ten best that are found.

- index: `ImageIndex`, its images added in batches of 256 as `update` does, opened again and searched exactly;
- index, approximate: the same through faiss, whose structure it builds at the first such search and keeps on disk;
- faiss flat, faiss IVF: `IndexFlatIP` and the same structure as the index builds, in memory, without names.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from configs.rules import whole
from data.distributed import progress
from prod import cells
from prod.index import CHUNK, ImageIndex
from utils import clean_exit

WIDTH, CENTRES, BATCH, QUERIES, K = 256, 1000, 256, 20, 10


def memory() -> tuple[int, int]:
    """(own, of mapped files) in MiB"""
    status = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines() if 'Rss' in line)
    return tuple(int(status[name].split()[0]) // 1024 for name in ('RssAnon', 'RssFile'))


def write_vectors(path: Path, count: int) -> None:
    noise = torch.Generator().manual_seed(0)
    centres = torch.randn(CENTRES, WIDTH, generator=noise)
    with open(path, 'wb') as file:
        for start in progress(range(0, count, CHUNK), desc='vectors'):
            size = min(CHUNK, count - start)
            near = centres[torch.randint(CENTRES, (size,), generator=noise)]
            file.write(F.normalize(near + torch.randn(size, WIDTH, generator=noise), dim=1).numpy().tobytes())


def build(place: Path, features: np.ndarray) -> None:
    index = ImageIndex(place / 'index', torch.from_numpy(features[0].copy()))
    for start in progress(range(0, len(features), BATCH), desc='index'):
        part = features[start:start + BATCH].copy()
        index.add([f'{start + i}.jpg' for i in range(len(part))], torch.from_numpy(part))


def ours(place: Path, features: np.ndarray, approximate: bool) -> tuple[float, Callable]:
    """(seconds to open, query -> numbers of the images)"""
    started = time.perf_counter()
    index = ImageIndex(place / 'index', torch.from_numpy(features[0].copy()))
    return time.perf_counter() - started, lambda query: [
        int(path[:-4]) for path, _ in index.search(torch.from_numpy(query), K, approximate=approximate)]


def faiss_alone(features: np.ndarray, flat: bool) -> Callable:
    import faiss
    if flat:
        index = faiss.IndexFlatIP(WIDTH)
        for start in range(0, len(features), CHUNK):
            index.add(features[start:start + CHUNK].copy())
    else:
        index = cells.build(features)
    return lambda query: index.search(query[None], K)[1][0].tolist()


def measure(side: str, place: Path, count: int, threads: int) -> dict:
    """What a side's row says; in a process of its own."""
    import faiss
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    features = np.memmap(place / 'vectors', np.float32, 'r', shape=(count, WIDTH))
    noise = np.random.default_rng(0)
    queries = features[-QUERIES:] + 0.05 * noise.standard_normal((QUERIES, WIDTH), np.float32)
    before, started, opened = memory(), time.perf_counter(), None
    if side == 'index':
        build(place, features)
        built = time.perf_counter() - started
        opened, ask = ours(place, features, approximate=False)
    elif side == 'index, approximate':
        opened, ask = ours(place, features, approximate=True)
        ask(queries[0])
        built = time.perf_counter() - started - opened
    else:
        ask = faiss_alone(features, flat=side == 'faiss flat')
        built = time.perf_counter() - started
    del features  # its pages are not the side's
    times, found = [], []
    for query in queries:
        started = time.perf_counter()
        found.append(ask(query))
        times.append(time.perf_counter() - started)
    own, mapped = (after - least for after, least in zip(memory(), before, strict=True))
    return {'rate': count / built, 'opened': opened, 'ms': 1000 * statistics.median(times), 'own': own,
            'mapped': mapped, 'found': found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=whole(QUERIES), nargs='+', default=[100_000, 1_000_000],
                        help='default: 100000 1000000')
    parser.add_argument('--threads', type=whole(1), default=2, help='default: %(default)s')
    args = parser.parse_args(argv)
    print('| images | side | build (images/s) | open (s) | query (ms) | memory, own (MiB) | mapped (MiB) | recall |')
    print('|---:|---|---:|---:|---:|---:|---:|---:|')
    for count in args.images:
        with tempfile.TemporaryDirectory() as place:
            write_vectors(Path(place) / 'vectors', count)
            exact = None
            for side in ('index', 'index, approximate', 'faiss flat', 'faiss IVF'):
                with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                    row = pool.submit(measure, side, Path(place), count, args.threads).result()
                exact = exact or row['found']
                recall = sum(len({*a} & {*b}) for a, b in zip(exact, row['found'], strict=True)) / (K * QUERIES)
                opened = '' if row['opened'] is None else f'{row["opened"]:.1f}'
                print(f'| {count:,} | {side} | {row["rate"]:,.0f} | {opened} | {row["ms"]:.1f} | {row["own"]:,} | '
                      f'{row["mapped"]:,} | {recall:.0%} |', flush=True)


if __name__ == '__main__':
    with clean_exit():
        main()
