"""Searching an index of many pictures: exactly, and through faiss.

    python -m bench.search --pictures 100000 1000000

Random unit vectors of 256 numbers around 1,000 centres, one query at a time, medians; the share of the exact ten best
that faiss finds is given beside its times.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == '__main__':  # run by its path, a script finds its own folder first on the path of modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F

from configs.rules import whole
from prod.index import PictureIndex
from utils import clean_exit, progress

WIDTH, CENTRES, CHUNK, QUERIES, K = 256, 1000, 100_000, 20, 10


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pictures', type=whole(1), nargs='+', default=[100_000, 1_000_000],
                        help='default: 100000 1000000')
    parser.add_argument('--threads', type=whole(1), default=2, help='default: %(default)s')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    centres = torch.randn(CENTRES, WIDTH)
    print('| pictures | exact (ms) | open (s) | faiss: build (s) | faiss (ms) | ratio | of the ten best found |')
    print('|---:|---:|---:|---:|---:|---:|---:|')
    for count in args.pictures:
        with tempfile.TemporaryDirectory() as place:
            index = PictureIndex(Path(place) / 'index', F.normalize(centres[0], dim=0))
            for start in progress(range(0, count, CHUNK), desc='writing'):
                size = min(CHUNK, count - start)
                features = F.normalize(centres[torch.randint(CENTRES, (size,))] + torch.randn(size, WIDTH), dim=1)
                index.add([f'{start + i}.jpg' for i in range(size)], features)
            queries = features[:QUERIES] + 0.05 * torch.randn(QUERIES, WIDTH)
            started = time.perf_counter()
            index = PictureIndex(Path(place) / 'index', F.normalize(centres[0], dim=0))
            opened = time.perf_counter() - started
            times, found = {True: [], False: []}, {True: [], False: []}
            started = time.perf_counter()
            index.search(queries[0], K, approximate=True)
            built = time.perf_counter() - started
            for query in queries:
                for approximate in (False, True):
                    started = time.perf_counter()
                    found[approximate].append({path for path, _ in index.search(query, K, approximate=approximate)})
                    times[approximate].append(time.perf_counter() - started)
            exact, near = (1000 * statistics.median(times[kind]) for kind in (False, True))
            share = sum(len(a & b) for a, b in zip(found[True], found[False], strict=True)) / (K * QUERIES)
            print(f'| {count:,} | {exact:.1f} | {opened:.1f} | {built:.1f} | {near:.1f} | {exact / near:.1f} | '
                  f'{share:.0%} |', flush=True)


if __name__ == '__main__':
    with clean_exit():
        main()
