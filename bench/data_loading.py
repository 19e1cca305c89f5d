"""Loading all.json with millions of pairs: time to the first batch, and the memory that each worker takes.

    python -m bench.data_loading

Every pair names one of a few small pictures, so that the pairs and not the pixels are what is measured. Each
measurement is a fresh process: it opens all.json, starts a DataLoader with its workers and draws batches in random
order. Ours reads the memory-mapped index (built once, by a process of its own, whose time and memory are given too);
the original's way is json.load and a dataset that keeps the list. Memory of a worker is what no other process shares
with it (USS: private pages, Linux), with that of the same loader over 1,000 pairs beside it.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

from PIL import Image

from bench.common import fresh, in_turns
from configs.rules import whole
from eval.table import markdown
from utils import clean_exit

OURS = """
from data.datasets import PairDataset
from data.loader import make_loader
from data.transforms import TrainTransform
dataset = PairDataset(path, TrainTransform(16, 0.5, False), 30)
loader = make_loader(dataset, 64, seed=0, epoch=0, start_batch=0, workers=4, rank=0, world_size=1)
"""
THEIRS = """
import json
import torch
from data.captions import clean_caption
from data.images import open_part
from data.transforms import TrainTransform
class Pairs(torch.utils.data.Dataset):
    def __init__(self):
        self.pairs, self.transform = json.load(open(path)), TrainTransform(16, 0.5, False)
    def __len__(self):
        return len(self.pairs)
    def __getitem__(self, i):
        pair = self.pairs[i]
        pixels = open_part(pair['image_root'], self.transform.crop, self.transform.image_size)
        return self.transform(pixels, clean_caption(pair['caption'], 30))[0], pair['caption']
loader = torch.utils.data.DataLoader(Pairs(), 64, shuffle=True, drop_last=True, num_workers=4)
"""
CHILD = """
import json, re, sys, time
started = time.perf_counter()
path, batches = sys.argv[1], int(sys.argv[2])
def kib(pid, *names):
    rollup = open(f'/proc/{pid}/smaps_rollup').read()
    return sum(int(re.search(rf'^{name}: +([0-9]+)', rollup, re.MULTILINE)[1]) for name in names)
%s
iterator = iter(loader)
next(iterator)
first = time.perf_counter() - started
for _ in range(min(batches, len(loader)) - 1):
    next(iterator)
workers = [worker.pid for worker in iterator._workers]
own = [kib(pid, 'Private_Clean', 'Private_Dirty') / 1024 for pid in workers]
print(json.dumps([first, kib('self', 'Rss') / 1024, max(own), sum(own)]))
"""
BUILD = """
import json, resource, sys, time
from pathlib import Path
from data.index import build_index
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
build_index(Path(sys.argv[1]))
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps([time.perf_counter() - started, grown]))
"""


def write_pairs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(16):
        Image.new('RGB', (24, 24), (16 * i, 0, 0)).save(folder / f'{i}.jpg')
    path = folder / 'all.json'
    with open(path, 'w', encoding='utf-8') as file:
        for i in range(count):
            record = {'caption': f'picture {i} of many: a dog runs after a ball on the beach',
                      'image_root': f'{folder}/{i % 16}.jpg', 'id': i}
            file.write(('[\n' if not i else ',\n') + json.dumps(record))
        file.write('\n]\n')
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', type=whole(1), default=5_000_000)
    parser.add_argument('--batches', type=whole(1), default=500, help='of 64, after which memory is read')
    parser.add_argument('--rounds', type=whole(1), default=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        few, many = (write_pairs(Path(place) / name, count) for name, count in (('few', 1000), ('many', args.pairs)))
        fresh(BUILD, few)
        seconds, grown = fresh(BUILD, many)
        print(markdown([{'all.json (MB)': f'{many.stat().st_size / 1e6:.0f}',
                         'its index (MB)': f'{os.path.getsize(f"{many}.arrow") / 1e6:.0f}',
                         'index built in (s)': f'{seconds:.0f}', 'memory for it (MiB)': f'{grown:.0f}'}]), flush=True)
        sides = {f'{name}, {count}': (code, path) for count, path in (('1,000', few), (f'{args.pairs:,}', many))
                 for name, code in (('ours', OURS), ('json.load', THEIRS))}
        medians = in_turns({name: partial(fresh, CHILD % code, path, args.batches)
                            for name, (code, path) in sides.items()}, args.rounds)
    print(markdown([{'pairs': name, 'first batch (s)': f'{first:.1f}', 'main process (MiB)': f'{main_process:.0f}',
                     'largest worker (MiB)': f'{largest:.0f}', '4 workers (MiB)': f'{workers:.0f}'}
                    for name, (first, main_process, largest, workers) in medians.items()]))
    print(f'\nMedians of {args.rounds}; memory after {args.batches} batches of 64; files in the page cache; the first '
          f'batch is counted from the start of the process, imports included.')


if __name__ == '__main__':
    with clean_exit():
        main()
