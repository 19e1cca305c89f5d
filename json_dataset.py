"""Turn downloaded CC3M, COCO, SBU and Visual Genome into `all.json` for pre-training.

    python json_dataset.py                  # of /datadrive; or --root FOLDER [--out FOLDER/dataloader]

Reads ROOT/cc3m, ROOT/mscoco, ROOT/sbu (img2dataset, `--output_format files`) and ROOT/vgo (Visual Genome:
region_descriptions.json with VG_100K and VG_100K_2), whichever are there. Writes cc3m.json, coco.json, sbu.json,
vgo.json and all.json: lists of {"caption", "image_root", "id"}, id unique and contiguous; SOURCE_failed.parquet, a list
for img2dataset of what could not be downloaded; and pairs.png, histograms of caption lengths and image sizes. The
files are replaced together at the end, and memory does not grow with the pairs (but for 8 bytes each, by which
duplicates are found).
"""

if __name__ == '__main__':  # before the slow imports
    from utils import end_at_once
    end_at_once()

import argparse
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.rules import output_path, whole
from data.distributed import progress
from data.downloads import Part, find_shards, read_shard, read_visual_genome
from data.folders import locked
from utils import TEMPORARY, WORKERS, as_worker, atomic_write, clean_exit, make_output_dir, shorten

SOURCES = {'cc3m': 'cc3m.json', 'mscoco': 'coco.json', 'sbu': 'sbu.json', 'vgo': 'vgo.json'}
FAILED = pa.schema({'url': pa.string(), 'caption': pa.string()})
PANELS = {'words of the caption (60 and more in the last bin)': np.arange(1, 62),  # and the edges of the bins
          'shorter side as stored (pixels)': np.geomspace(16, 8192, 55),
          'shorter side as published (pixels)': np.geomspace(16, 8192, 55)}


class PairWriter:
    """Streams records into a JSON list, one a line, numbering them from 0."""

    def __init__(self, file):
        self.file, self.count = file, 0

    def write(self, text: pa.Buffer, count: int) -> None:
        """`count` records as `numbered` from `self.count` on."""
        if count:
            self.file.write(b',\n' if self.count else b'[\n')
            self.file.write(text)
            self.count += count

    def close(self) -> None:
        self.file.write(b'\n]\n' if self.count else b'[]\n')


def numbered(records: pa.StringArray, first: int) -> pa.Buffer:
    """The records with their ids, which their places decide, in UTF-8."""
    ids = pa.array(np.arange(first, first + len(records))).cast(pa.string())
    records = pc.binary_join_element_wise(records, ids, '}', '')
    return pc.binary_join(pa.ListArray.from_arrays([0, len(records)], records), ',\n')[0].as_buffer()


class Seen:
    """A set of uint64 at 8 bytes each: sorted runs, the short ones merged into longer ones as they come."""

    def __init__(self):
        self.runs: list[np.ndarray] = []

    def holds(self, values: np.ndarray) -> np.ndarray:
        """bool [N]; quickest for sorted values, which are near each other in memory."""
        found = np.zeros(len(values), bool)
        for run in self.runs:
            found |= run[np.searchsorted(run, values).clip(max=len(run) - 1)] == values
        return found

    def add(self, values: np.ndarray) -> np.ndarray:
        """bool [N]: which of them are new; of equal ones the first is."""
        run, first = np.unique(values, return_index=True)
        fresh = ~self.holds(run)
        run, new = run[fresh], np.zeros(len(values), bool)
        new[first[fresh]] = True
        while self.runs and len(self.runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]))
        if len(run):
            self.runs.append(run)
        return new


class Tally:
    """What a source came to: pairs kept and, by reason, dropped; histograms of the kept ones (one per panel)."""

    def __init__(self):
        self.fates = Counter(kept=0)
        self.histograms = [np.zeros(len(edges) - 1, int) for edges in PANELS.values()]

    def add(self, part: Part, new: np.ndarray) -> None:
        self.fates += part.dropped
        self.fates['kept'] += int(new.sum())
        self.fates['duplicate'] += int((~new).sum())
        for counts, edges, values in zip(self.histograms, PANELS.values(), [part.words, *part.sides.T], strict=True):
            values = values[new]
            counts += np.histogram(values[values > 0].clip(edges[0], edges[-1]), edges)[0]


def in_order(pool: ProcessPoolExecutor, function: Callable, items: list, ahead: int) -> Iterator:
    """`function` of every item, at most `ahead` of them worked on or waiting to be taken."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def parts_of(source: str, folder: Path, pool: ProcessPoolExecutor, workers: int) -> Iterator[Part]:
    if source == 'vgo':
        return progress(read_visual_genome(folder), desc='vgo, thousands of images')
    shards = find_shards(folder)
    return progress(in_order(pool, read_shard, shards, 2 * workers), len(shards), f'{source} shards')


def build(root: Path, out: Path, sources: list[str], workers: int) -> dict[str, Tally]:
    """Write the files.

    Raises:
        FileNotFoundError: none of the sources is there.
        ValueError: a source that is not what its folder says, or no usable pair in any of them.
    """
    present = [source for source in sources if (root / source).is_dir()]
    for source in sources:
        if source not in present:
            print(f'{root / source}: not there, skipped')
    if not present:
        raise FileNotFoundError(f'none of {", ".join(sources)} in {root}: download at least one (data/README.md, '
                                f'"Download")')
    for name in ('all.json', *SOURCES.values(), '*_failed.parquet', 'pairs.png'):
        for leftover in out.glob(f'{name}{TEMPORARY}'):  # of a build that was killed: `main` locks the folder
            leftover.unlink()
    tallies = {source: Tally() for source in present}
    # Older files are replaced together, when every source has been read.
    with ExitStack() as files, ProcessPoolExecutor(workers, WORKERS, as_worker) as pool:
        everything = PairWriter(files.enter_context(atomic_write(out / 'all.json', 'wb')))
        for source in present:
            writer = PairWriter(files.enter_context(atomic_write(out / SOURCES[source], 'wb')))
            failed_list = files.enter_context(pq.ParquetWriter(
                files.enter_context(atomic_write(out / f'{source}_failed.parquet', 'wb')), FAILED))
            kept, failed = Seen(), Seen()
            for part in parts_of(source, root / source, pool, workers):
                if part.note:
                    print(part.note)
                new = kept.add(part.identity)
                records = part.records if new.all() else part.records.filter(pa.array(new))
                text = numbered(records, writer.count)
                same = everything.count == writer.count  # numbers, in the first source
                everything.write(text if same else numbered(records, everything.count), len(records))
                writer.write(text, len(records))
                tallies[source].add(part, new)
                again = failed.add(part.failed_identity) & ~kept.holds(part.failed_identity)
                if again.any():
                    failed_list.write_table(pa.table(part.failed, FAILED).filter(pa.array(again)))
            writer.close()
        if not everything.count:
            raise ValueError(f'no usable pair in {root}: {({s: dict(tally.fates) for s, tally in tallies.items()})}')
        everything.close()
    return tallies


def summary(tallies: dict[str, Tally]) -> str:
    """A table: a row per source, a column per fate of a pair."""
    total = sum((tally.fates for tally in tallies.values()), Counter())  # leaves out what counts 0
    reasons = sorted(total.keys() - {'kept'})
    rows = [['source', 'kept', *reasons]] + [
        [source, *(str(fates[column]) for column in ('kept', *reasons))]
        for source, fates in [*((source, tally.fates) for source, tally in tallies.items()), ('all', total)]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(tallies: dict[str, Tally], file) -> None:
    """PNG: a panel per histogram, a line per source; a source without recorded sizes is named in the panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout='constrained')
    for i, (axes, (title, edges)) in enumerate(zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True)):
        for source, tally in tallies.items():
            counts, kept = tally.histograms[i], tally.fates['kept']
            label = f'{source} ({counts.sum():,} of {kept:,})' if counts.any() else f'{source} (not recorded)'
            axes.stairs(counts / max(1, counts.sum()), edges, label=label)
        axes.set(xlabel=title, ylabel='share of the source')
        if i:
            axes.set_xscale('log', base=2)
        axes.legend()
    figure.savefig(file, format='png', dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', default='/datadrive', type=Path,
                        help='folder of the downloaded sources (default: %(default)s)')
    parser.add_argument('--out', type=output_path, help='folder for the JSON files (default: ROOT/dataloader)')
    parser.add_argument('--sources', nargs='+', choices=SOURCES, default=list(SOURCES))
    parser.add_argument('--workers', type=whole(1, 1024), default=os.cpu_count(),
                        help='processes (default: one per core)')
    args = parser.parse_args(argv)
    if not os.path.isdir(args.root):
        raise FileNotFoundError(f'no data folder {shorten(args.root)}: name it with --root')
    root = args.root.resolve()
    if not str(root).isascii() and '\ufffd' in os.fsencode(root).decode(errors='replace'):
        raise ValueError(f'the path {str(root)!r} is not UTF-8, and all.json must be: rename the folder')
    out = make_output_dir(args.out or root / 'dataloader', '--out')
    with locked(out):
        tallies = build(root, out, args.sources, args.workers)
        with atomic_write(out / 'pairs.png', 'wb') as file:
            draw(tallies, file)
    print(summary(tallies))
    print(f'written to {out / "all.json"}, histograms to {out / "pairs.png"}')


if __name__ == '__main__':
    with clean_exit():
        main()
