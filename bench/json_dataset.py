"""json_dataset.py beside the original's way, and the memory it takes for millions of pairs.

    python -m bench.json_dataset

Speed: shards of img2dataset with 10,000 pictures each, as files (a small JPEG under many names: hard links; a .json and
a .txt of its own for every picture) beside their parquet. The original's way walks the folders, opens every .json in
threads and dumps the list: it is written out below. The sides take turns in one process each, whose imports are not
counted, on files in the page cache; medians of the rounds.

Memory: the pictures as hard links and the parquet tables alone (with a table the .json and .txt are never opened),
read by the command as a user starts it; the largest resident memory of all its processes together, asked for every
100 ms (Linux).
"""

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

from utils import ROOT, clean_exit, progress

SHARD = 10_000  # pictures
FAILED = 5  # one download in this many failed, in the large set
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
original(*sys.argv[1:])
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


def write_shard(folder: Path, number: int, fail_every: int, side_files: bool) -> None:
    """A shard as img2dataset leaves it; its pictures are one file (ext4 allows 65,000 names of it)."""
    shard = folder / f'{number:05d}'
    shard.mkdir(parents=True)
    rows = []
    for i in range(SHARD):
        failed = fail_every and (number * SHARD + i) % fail_every == 0
        rows.append({'caption': f'picture {i} of shard {number}: a dog runs after a ball on the beach',
                     'url': f'https://pictures.example.com/{number}/{i}.jpg', 'key': f'{number:05d}{i:04d}',
                     'status': 'failed_to_download' if failed else 'success',
                     'error_message': 'HTTP Error 404: Not Found' if failed else None,
                     'width': 256, 'height': 256, 'original_width': 640, 'original_height': 480, 'exif': '{}',
                     'sha256': f'{number * SHARD + i:064x}'})
    pq.write_table(pa.Table.from_pylist(rows), folder / f'{number:05d}.parquet')
    picture = folder / f'{number:05d}.source'
    Image.new('RGB', (8, 8)).save(picture, 'JPEG')
    for row in rows:
        if row['status'] == 'success':
            os.link(picture, shard / f'{row["key"]}.jpg')
            if side_files:
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shards', type=int, default=20, help='of the timed set (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--large_shards', type=int, default=625, help='of the set whose memory is measured; one in '
                        f'{FAILED} of {SHARD:,} failed (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        root, out = Path(place) / 'timed', Path(place) / 'out'
        out.mkdir()
        for number in progress(range(args.shards), desc='writing shards'):
            write_shard(root / 'cc3m', number, 0, True)
        sides = {'original': THEIRS, 'ours': OURS.format(workers=args.workers)}
        for code in sides.values():
            timed(code, root, out)  # into the page cache
        times = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, code in sides.items():
                times[name].append(timed(code, root, out))
        ratio = statistics.median(a / b for a, b in zip(times['original'], times['ours'], strict=True))
        theirs, ours = (statistics.median(times[name]) for name in ('original', 'ours'))
        print(f'{args.shards} shards, {args.shards * SHARD:,} pairs: original {theirs:.2f} s, ours {ours:.2f} s with '
              f'{args.workers} processes, {ratio:.1f}x')
        root = Path(place) / 'large'
        for number in progress(range(args.large_shards), desc='writing shards'):
            write_shard(root / 'cc3m', number, FAILED, False)
        seconds, peak, printed = measured([sys.executable, 'json_dataset.py', '--root', str(root), '--out', str(out),
                                           '--workers', str(args.workers)])
        kept = int(re.search(r'^ +all +(\d+)', printed, re.MULTILINE)[1])
        size = (out / 'all.json').stat().st_size
        print(f'{args.large_shards} shards: {kept:,} pairs kept, {seconds:.0f} s, at most {peak / 2 ** 20:.0f} MiB '
              f'resident over {1 + args.workers} processes; all.json has {size / 1e6:.0f} MB')


if __name__ == '__main__':
    with clean_exit():
        main()
