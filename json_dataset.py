"""Turn downloaded CC3M, COCO, SBU and Visual Genome into `all.json` for pre-training.

    python json_dataset.py --root /datadrive --out /datadrive/dataloader

Reads ROOT/cc3m, ROOT/mscoco, ROOT/sbu (img2dataset, `--output_format files`) and ROOT/vgo (Visual Genome:
region_descriptions.json with VG_100K and VG_100K_2), whichever are there. Writes cc3m.json, coco.json, sbu.json,
vgo.json and all.json: lists of {"caption", "image_root", "id"}, id unique and contiguous. A file appears whole or
not at all.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from utils import atomic_write, clean_exit, make_output_dir, progress

SOURCES = {'cc3m': 'cc3m.json', 'mscoco': 'coco.json', 'sbu': 'sbu.json', 'vgo': 'vgo.json'}
PICTURES = ('.jpg', '.jpeg', '.png', '.webp')
MIN_WORDS, MIN_AREA = 5, 0.2 * 800 * 600  # Visual Genome regions: more than 4 words, more than 20% of 800 x 600
Pair = tuple[str, str]  # caption, picture path


def read_shard(shard: Path) -> tuple[list[Pair], Counter]:
    """The pairs of one img2dataset shard folder, and why the rest were dropped.

    From `<shard>.parquet` when it is there (status 'success'), else from the .json or .txt file of each picture.

    Raises:
        ValueError: an unreadable parquet or JSON file, named.
    """
    pictures = {}
    for entry in os.scandir(shard):
        stem, extension = os.path.splitext(entry.name)
        if extension.lower() in PICTURES and entry.stat().st_size:
            pictures[stem] = entry.path
    table = shard.with_suffix('.parquet')
    rows = parquet_rows(table) if table.exists() else side_file_rows(shard, pictures)
    pairs, dropped, seen = [], Counter(), set()
    for key, caption, success in rows:
        caption = ' '.join(caption.split()) if isinstance(caption, str) else ''
        reason = ('failed download' if not success else 'missing file' if key not in pictures else
                  'empty caption' if not caption else 'duplicate' if key in seen else None)
        seen.add(key)
        if reason:
            dropped[reason] += 1
        else:
            pairs.append((caption, pictures[key]))
    return pairs, dropped


def parquet_rows(path: Path) -> Iterator[tuple[str, str | None, bool]]:
    try:
        table = pq.read_table(path, columns=['key', 'caption', 'status'])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f'{path} is not a readable img2dataset table ({str(error)[:100]}): remove it to read the '
                         f'.json and .txt files instead, or download the shard again') from None
    for key, caption, status in zip(*(table[name].to_pylist() for name in ('key', 'caption', 'status')), strict=True):
        yield key, caption, status == 'success'


def side_file_rows(shard: Path, pictures: dict[str, str]) -> Iterator[tuple[str, str | None, bool]]:
    for key in sorted(pictures):
        record, text = shard / f'{key}.json', shard / f'{key}.txt'
        if record.exists():
            try:
                yield key, json.loads(record.read_text(encoding='utf-8')).get('caption'), True
            except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
                raise ValueError(f'{record} is not a JSON record: remove it or download its shard again') from None
        else:
            yield key, text.read_text(encoding='utf-8', errors='replace') if text.exists() else None, True


def read_visual_genome(folder: Path) -> tuple[list[Pair], Counter]:
    """Regions long and large enough, as the caption of their whole picture (the original's rule)."""
    path = folder / 'region_descriptions.json'
    try:
        images = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise FileNotFoundError(f'no {path}: unpack region_descriptions.json.zip of Visual Genome there') from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not valid JSON ({error}): unpack it again') from None
    files = {entry.name: entry.path for part in ('VG_100K_2', 'VG_100K') if (folder / part).is_dir()
             for entry in os.scandir(folder / part)}
    pairs, dropped = [], Counter()
    try:
        for image in images:
            picture = files.get(f'{image["id"]}.jpg')
            for region in image['regions']:
                caption = ' '.join((region['phrase'] or '').split())
                reason = ('missing file' if picture is None else
                          'short phrase' if len(caption.split()) < MIN_WORDS else
                          'small region' if region['width'] * region['height'] <= MIN_AREA else None)
                if reason:
                    dropped[reason] += 1
                else:
                    pairs.append((caption, picture))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not Visual Genome\'s list of images with regions ({error!r}): '
                         f'unpack region_descriptions.json.zip again') from None
    return pairs, dropped


class PairWriter:
    """Streams records into a JSON list, one a line, numbering them from 0."""

    def __init__(self, file):
        self.file, self.count = file, 0
        file.write('[')

    def write(self, pairs: list[Pair]) -> None:
        for caption, picture in pairs:
            record = {'caption': caption, 'image_root': picture, 'id': self.count}
            self.file.write((',\n' if self.count else '\n') + json.dumps(record, ensure_ascii=False))
            self.count += 1

    def close(self) -> None:
        self.file.write('\n]\n')


def jobs_of(source: str, folder: Path) -> list:
    """Callables that each return (pairs, dropped) of a part of a source."""
    if source == 'vgo':
        return [partial(read_visual_genome, folder)]
    shards = sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit())
    if not shards:
        raise ValueError(f'{folder} holds no img2dataset shards (00000, 00001, ...): download with '
                         f'--output_format files into it')
    return [partial(read_shard, shard) for shard in shards]


def build(root: Path, out: Path, sources: list[str], workers: int) -> dict[str, Counter]:
    """Write the files -> per source a count of kept and, by reason, dropped pairs.

    Raises:
        FileNotFoundError: none of the sources is there.
    """
    present = [source for source in sources if (root / source).is_dir()]
    for source in sources:
        if source not in present:
            print(f'{root / source}: not there, skipped')
    if not present:
        raise FileNotFoundError(f'none of {", ".join(sources)} in {root}: download at least one (README, "Data")')
    counts: dict[str, Counter] = {}
    # Older files are replaced together, when every source has been read.
    with ExitStack() as files, ProcessPoolExecutor(workers) as pool:
        everything = PairWriter(files.enter_context(atomic_write(out / 'all.json')))
        for source in present:
            jobs, counts[source] = jobs_of(source, root / source), Counter()
            writer = PairWriter(files.enter_context(atomic_write(out / SOURCES[source])))
            for pairs, dropped in progress(pool.map(call, jobs), len(jobs), f'{source} shards'):
                writer.write(pairs)
                everything.write(pairs)
                counts[source] += Counter(kept=len(pairs)) + dropped
            writer.close()
        if not everything.count:
            raise ValueError(f'no usable pair in {root}: {counts}')
        everything.close()
    return counts


def call(job):
    return job()


def summary(counts: dict[str, Counter]) -> str:
    """A table: a row per source, a column per fate of a pair."""
    columns = ['kept', *sorted({reason for count in counts.values() for reason in count} - {'kept'})]
    rows = [['source', *columns]] + [[source, *(str(count[c]) for c in columns)] for source, count in counts.items()]
    rows.append(['all', *(str(sum(count[c] for count in counts.values())) for c in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', required=True, type=Path, help='folder of the downloaded sources')
    parser.add_argument('--out', required=True, type=Path, help='folder for the JSON files')
    parser.add_argument('--sources', nargs='+', choices=SOURCES, default=list(SOURCES))
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if not args.root.is_dir():
        raise FileNotFoundError(f'no data folder {args.root}')
    counts = build(args.root.resolve(), make_output_dir(args.out), args.sources, args.workers)
    print(summary(counts))
    print(f'written to {args.out / "all.json"}')


if __name__ == '__main__':
    with clean_exit():
        main()
