"""Pre-training pairs straight from `webdataset` shards, as img2dataset writes them, which are read and not unpacked.

An epoch is the shards in an order drawn from (seed, epoch), one after the other. Every worker of every process reads a
run of it that is its own, of as many samples as its batches take, whatever the number of shards. Samples are shuffled
within windows of `WINDOW`. All of it follows from the position in the epoch, so that a resumed run goes on with the
very next sample, without opening the shards that were read before.
"""

import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.shardlists import expand_urls

from data.captions import is_empty
from data.datasets import first_readable, held_out_count
from data.distributed import gather_objects, progress, rank, world_size
from data.tars import SCHEME, TAR, count_images, one_line_of, read_shard
from data.transforms import TrainTransform
from utils import shorten

MOST_SHARDS = 10 ** 6
RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
WINDOW = 1024  # samples, still encoded: some 25 MB in a worker where images are 256 px


class Sample(NamedTuple):
    image: io.BytesIO  # encoded; its attribute `name` is SHARD/FILE
    caption: str  # raw
    number: int  # unique in the set
    lost: tuple[str, str, str] | None = None  # (path, kind, message) of the sample in whose place it stands


def is_shards(source: str) -> bool:
    """Whether `data.train` names tars, or a folder of them, rather than a file or another folder."""
    if SCHEME.match(source) or '::' in source:
        return True
    if os.path.isdir(source):
        return bool(tars_of(source))
    mark = list(TAR.finditer(source))
    return bool(mark) and mark[-1].end() == len(source)


def tars_of(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).iterdir()
                  if is_shards(path.name) and not path.name.startswith('.') and path.is_file())


def list_shards(source: str, setting: str = 'data.train') -> list[str]:
    """The tars of a pattern like `cc3m/{00000..00331}.tar`, of a folder, or of several of either joined by `::`.

    Args:
        setting: how an error calls the source.

    Raises:
        FileNotFoundError: a file or folder is not there, or a folder holds no tar.
        ValueError: the pattern's braces or variables are none.
    """
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in RANGE.findall(source)) > MOST_SHARDS:
        raise ValueError(f'{setting}: {shorten(source)} stands for more than {MOST_SHARDS:,} shards: mend its braces')
    try:
        parts = [url.strip() for url in expand_urls(source)]
    except AssertionError as error:  # ${NAME} without a variable WDS_NAME
        raise ValueError(f'{setting}: {error}') from None
    urls = []
    for url in parts:
        inside = tars_of(url) if os.path.isdir(url) else [url]
        if not inside:
            raise FileNotFoundError(f'{url} holds no .tar: {setting} takes what img2dataset --output_format '
                                    f'webdataset writes')
        urls += inside
    missing = [url for url in urls if not SCHEME.match(url) and not os.path.isfile(url)]  # the others: when read
    if missing:
        raise FileNotFoundError(f'{len(missing)} of the {len(urls)} shards of {setting} are not there, for example '
                                f'{missing[0]}')
    return urls


class ShardDataset:
    """The pairs of img2dataset's tars, in place of a `PairDataset`.

    Launched on several processes, each counts some of the shards.

    Args:
        source: what `list_shards` takes.

    Raises:
        FileNotFoundError, ValueError: a shard is missing, cannot be read, or all are empty.
    """

    def __init__(self, source: str, transform: TrainTransform, max_words: int, seed: int = 0):
        self.transform, self.max_words, self.seed, self.epoch = transform, max_words, seed, 0
        self.urls = list_shards(source)
        mine = progress(self.urls[rank()::world_size()], desc='counting shards')
        parts = gather_objects([count_images(url) for url in mine])
        self.counts = np.array([parts[i % world_size()][i // world_size()] for i in range(len(self.urls))])
        self.held = np.zeros_like(self.counts)  # samples at the start of each shard that are held out
        self.first = np.cumsum(self.counts) - self.counts  # number of each shard's first sample
        if not len(self):
            raise ValueError(f'{source} holds no image: its downloads failed')

    def __len__(self) -> int:
        return int(self.counts.sum())

    def hold_out(self, share: float) -> list[tuple[io.BytesIO, str]]:
        """`Captioned.hold_out`: the first samples of a few shards, from each at most a half. (file, raw caption)"""
        few = [i * len(self.urls) // 8 for i in range(8)] if len(self.urls) > 8 else range(len(self.urls))
        most = -(-held_out_count(share, len(self)) // len(few))
        held_out = []
        for shard in few:
            self.held[shard] = min(most, self.counts[shard] // 2)
            self.counts[shard] -= self.held[shard]
            with suppress(Exception), closing(read_shard(self.urls[shard])) as samples:  # training says what is damaged
                held_out += islice(samples, int(self.held[shard]))
        return held_out

    def examples(self, count: int) -> list[io.BytesIO]:
        """Images to be looked at, from the start of the set."""
        return [sample.image for sample in islice(self.rows(range(len(self.urls)), 0, len(self)), count)]

    def rows(self, order, first: int, last: int) -> Iterator[Sample]:
        """Samples `first` up to `last` of the shards in an order."""
        begin = 0
        for place, shard in enumerate(order):
            end = begin + self.counts[shard]
            if end > first and begin < last:
                following = [*order[place:], *order[:place]]
                yield from islice(self.filled(following), max(0, first - begin), min(last, end) - begin)
            begin = end

    def filled(self, order) -> Iterator[Sample]:
        """As many samples as the first shard should hold; for those that it lost the following shards' stand in."""
        wanted, lost, barren = self.counts[order[0]], None, 0
        for shard in cycle(order):
            url, before, problem = self.urls[shard], wanted, 'it ends early'
            try:
                with closing(read_shard(url)) as samples:
                    kept = islice(samples, int(self.held[shard]), None)
                    for index, (image, caption) in enumerate(islice(kept, min(wanted, self.counts[shard]))):
                        wanted -= 1
                        yield Sample(image, caption, int(self.first[shard]) + index, lost)
            except Exception as error:  # whatever files, commands, decompressors and tars raise
                problem = one_line_of(error)
            if not wanted:
                return
            lost = lost or (url, 'damaged', f'{wanted} samples of {url} are lost: {problem}')
            barren = barren + 1 if wanted == before else 0
            if barren == len(order):
                raise ValueError(f'none of the {len(order)} shards can be read: {lost[2]}')


class ShardStream(IterableDataset):
    """The items (see `first_readable`) of a process's batches `start_batch` up to `batches` of the dataset's epoch.

    Batch k of a process is made by its worker k modulo their number. With another number of processes or workers the
    epoch is cut into other runs: a run that is resumed within an epoch then sees some of its samples twice and others
    not before the next.
    """

    def __init__(self, dataset: ShardDataset, batch_size: int, batches: int, start_batch: int, rank: int):
        self.dataset, self.batch_size, self.batches = dataset, batch_size, batches
        self.start_batch, self.rank = start_batch, rank

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        lane = (self.start_batch + worker) % workers  # the loader asks worker 0 first
        before, size = (sum(len(range(other, self.batches, workers)) for other in range(lane)),
                        len(range(lane, self.batches, workers)))
        done = len(range(lane, self.start_batch, workers))
        first = (self.rank * self.batches + before) * self.batch_size
        return self.items(first, first + size * self.batch_size, done * self.batch_size)

    def items(self, first: int, last: int, done: int) -> Iterator[dict]:
        """The items of the epoch's samples `first` up to `last`, in windows, less the `done` ones."""
        dataset, seeds = self.dataset, (self.dataset.seed, self.dataset.epoch)
        order = np.random.default_rng(seeds).permutation(len(dataset.urls))
        skipped = done // WINDOW * WINDOW
        done -= skipped
        with closing(dataset.rows(order, first + skipped, last)) as rows:
            for start in range(first + skipped, last, WINDOW):
                window = list(islice(rows, min(WINDOW, last - start)))
                if all(is_empty(sample.caption) for sample in window):
                    raise ValueError(f'none of the {len(window)} samples from {window[0].image.name} on has a caption')
                np.random.default_rng((*seeds, start)).shuffle(window)
                for place in range(done, len(window)):
                    pairs = ((sample.image, sample.caption, sample.number)  # the next in the window stand in
                             for sample in window[place:] + window[:place] if not is_empty(sample.caption))
                    sample = window[place]
                    item = first_readable(pairs, dataset.transform, dataset.max_words, *seeds, sample.number)
                    item['bad'] += [sample.lost] if sample.lost else []
                    yield item
                done = 0
