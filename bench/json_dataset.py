"""json_dataset.py beside the original's way, and the memory it takes for millions of pairs.

    python -m bench.json_dataset

Speed: shards of img2dataset with 10,000 pictures each, as files (a small JPEG under many names: hard links; a .json and
a .txt of its own for every picture) beside their parquet. The original's way walks the folders, opens every .json in
threads and dumps the list: it is written out below. The sides take turns in one process each, whose imports are not
counted, on files in the page cache; medians of the rounds.

Memory: one shard of pictures and its parquet table (with a table the .json and .txt are never opened) under many names,
read by the command as a user starts it; the largest resident memory of all its processes together, asked for every
100 ms (Linux).
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from configs.rules import whole
from data.distributed import progress
from utils import ROOT, clean_exit

SHARD = 10_000  # pictures
OURS = """
import sys, time
from pathlib import Path
import json_dataset
root, out = map(Path, sys.argv[1:])
started = time.perf_counter()
json_dataset.build(root, out, ['cc3m'], {workers})
print(time.perf_counter() - started)
"""
THEIRS = """
import sys, time
from bench.json_dataset import original
started = time.perf_counter()
original(f'{sys.argv[1]}/cc3m', sys.argv[2])  # not the folder with its own output
print(time.perf_counter() - started)
"""


def original(root: str, out: str) -> None:
    """Walk, open every JSON in threads, dump: the way of the original's json_dataset.py."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names
             if name.endswith('.json') and not name.endswith('_stats.json')]

    def read(path):
        with open(path, encoding='utf-8') as file:
            return {'caption': json.load(file)['caption'], 'image_root': path.replace('.json', '.jpg')}

    with ThreadPoolExecutor() as pool:
        pairs = list(pool.map(read, paths))
    for number, pair in enumerate(pairs):
        pair['id'] = number
    for name in ('cc3m.json', 'all.json'):
        with open(os.path.join(out, name), 'w', encoding='utf-8') as file:
            json.dump(pairs, file)


def write_shard(folder: Path, number: int, side_files: bool) -> None:
    """A shard as img2dataset leaves it; its pictures are one file (ext4 allows 65,000 names of it)."""
    shard = folder / f'{number:05d}'
    shard.mkdir(parents=True)
    keys = [f'{number:05d}{i:04d}' for i in range(SHARD)]
    table = pa.table({
        'caption': [f'picture {i} of shard {number}: a dog runs after a ball on the beach' for i in range(SHARD)],
        'url': [f'https://pictures.example.com/{key}.jpg' for key in keys], 'key': keys, 'status': ['success'] * SHARD,
        'width': [256] * SHARD, 'height': [256] * SHARD, 'original_width': [640] * SHARD,
        'original_height': [480] * SHARD, 'exif': ['{}'] * SHARD, 'sha256': [f'{key:>064}' for key in keys]})
    pq.write_table(table, folder / f'{number:05d}.parquet')
    picture = folder / f'{number:05d}.source'
    Image.new('RGB', (8, 8)).save(picture, 'JPEG')
    for key in keys:
        os.link(picture, shard / f'{key}.jpg')
    if side_files:
        for row in table.to_pylist():
            (shard / f'{row["key"]}.json').write_text(json.dumps(row))
            (shard / f'{row["key"]}.txt').write_text(row['caption'])


def timed(code: str, root: Path, out: Path) -> float:
    done = subprocess.run([sys.executable, '-c', code, str(root), str(out)], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return float(done.stdout.splitlines()[-1])


def resident(pid: int) -> int:
    """Bytes of a process and its descendants; a page that several of them map is shared out among them (PSS)."""
    try:
        total = int(re.search(r'Pss: +(\d+)', Path(f'/proc/{pid}/smaps_rollup').read_text())[1]) * 1024
        for task in os.listdir(f'/proc/{pid}/task'):
            total += sum(map(resident, map(int, Path(f'/proc/{pid}/task/{task}/children').read_text().split())))
        return total
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0


def measured(command: list[str]) -> tuple[float, int, str]:
    """Seconds, largest resident bytes of all its processes, what it printed."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    printed = []
    reader = threading.Thread(target=lambda: printed.append(process.stdout.read()))
    reader.start()
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    reader.join()
    if process.returncode:
        raise ValueError(f'{" ".join(command)} failed')
    return time.perf_counter() - started, peak, printed[0]


def compare(root: Path, shards: int, rounds: int, workers: int) -> None:
    out = root / 'out'
    out.mkdir(parents=True)
    for number in progress(range(shards), desc='writing shards'):
        write_shard(root / 'cc3m', number, True)
    sides = {'original': THEIRS, 'ours': OURS.format(workers=workers)}
    for code in sides.values():
        timed(code, root, out)  # into the page cache
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, code in sides.items():
            times[name].append(timed(code, root, out))
    ratio = statistics.median(a / b for a, b in zip(times['original'], times['ours'], strict=True))
    theirs, ours = (statistics.median(times[name]) for name in ('original', 'ours'))
    print('| pairs | processes | original (s) | ours (s) | times the original |\n|---:|---:|---:|---:|---:|')
    print(f'| {shards * SHARD:,} | {workers} | {theirs:.2f} | {ours:.2f} | {ratio:.1f} |\n', flush=True)


def measure_memory(root: Path, shards: int, workers: int) -> None:
    out, folder = root / 'out', root / 'cc3m'
    write_shard(folder, 0, False)
    first = folder / '00000.parquet'
    pq.write_table(pq.read_table(first).drop_columns('url'), first)  # pairs differ by their paths
    for number in range(1, shards):
        (folder / f'{number:05d}').symlink_to(folder / '00000')
        os.link(first, folder / f'{number:05d}.parquet')
    seconds, peak, printed = measured([sys.executable, 'json_dataset.py', '--root', str(root), '--out', str(out),
                                       '--workers', str(workers)])
    kept = int(re.search(r'^ +all +(\d+)', printed, re.MULTILINE)[1])
    size = (out / 'all.json').stat().st_size
    print('| pairs kept | seconds | memory of all processes (MiB) | all.json (MB) |\n|---:|---:|---:|---:|')
    print(f'| {kept:,} | {seconds:.0f} | {peak / 2 ** 20:.0f} | {size / 1e6:.0f} |', flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shards', type=whole(0), default=20, help='of the timed set (default: %(default)s)')
    parser.add_argument('--rounds', type=whole(1), default=5)
    parser.add_argument('--large_shards', type=whole(0), default=500, help='of the set whose memory is measured '
                        '(default: %(default)s)')
    parser.add_argument('--workers', type=whole(1), default=os.cpu_count())
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        if args.shards:
            compare(Path(place) / 'timed', args.shards, args.rounds, args.workers)
        if args.large_shards:
            measure_memory(Path(place) / 'large', args.large_shards, args.workers)


if __name__ == '__main__':
    with clean_exit():
        main()
