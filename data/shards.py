"""Pre-training pairs straight from img2dataset's `webdataset` shards: tars that are read in sequence, not unpacked.

An epoch is the shards in an order drawn from (seed, epoch), one after the other. Every worker of every process reads a
run of it that is its own, of as many samples as its batches take, whatever the number of shards. Samples are shuffled
within windows of `WINDOW`. All of it follows from the position in the epoch, so that a resumed run goes on with the
very next sample, without opening the shards that were read before.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tarfile_samples

from data.captions import clean_caption
from data.datasets import first_readable
from data.transforms import train_transform
from utils import gather_objects, progress, rank, world_size

PICTURES = ('jpg', 'jpeg', 'png', 'webp')
WINDOW = 1024  # samples, still encoded: some tens of MB in a worker


class Sample(NamedTuple):
    picture: io.BytesIO  # encoded; its attribute `name` is SHARD/FILE
    caption: str  # raw
    number: int  # unique in the set
    lost: tuple[str, str, str] | None = None  # (path, kind, message) of the sample in whose place it stands


def is_shards(source: str) -> bool:
    """Whether `data.train` names shards; anything else is an all.json."""
    return '.tar' in source or os.path.isdir(source)


def list_shards(source: str) -> list[str]:
    """The tars of a pattern like `cc3m/{00000..00331}.tar`, of a folder, or of several of either joined by `::`.

    Raises:
        FileNotFoundError: a file or folder is not there, or a folder holds no tar.
    """
    urls = []
    for url in map(str.strip, expand_urls(source)):
        if os.path.isdir(url):
            inside = sorted(map(str, Path(url).glob('*.tar')))
            if not inside:
                raise FileNotFoundError(f'{url} holds no .tar: data.train takes an all.json, or the output of '
                                        f'img2dataset --output_format webdataset')
            urls += inside
        else:
            urls.append(url)
    missing = [url for url in urls if ':' not in url and not os.path.isfile(url)]  # those with a scheme: when read
    if missing:
        raise FileNotFoundError(f'{len(missing)} of the {len(urls)} shards of data.train are not there, for example '
                                f'{missing[0]}')
    return urls


def count_pictures(url: str) -> int:
    """Pictures in a shard, from img2dataset's _stats.json beside it or, without one, from the tar's headers.

    Raises:
        ValueError: neither can be read.
    """
    head, _, tail = url.rpartition('.tar')  # of `pipe:COMMAND SHARD.tar -` there is a tail
    try:
        with gopen(f'{head}_stats.json{tail}') as file:
            return json.loads(file.read())['successes']
    except (OSError, ValueError, KeyError, TypeError):  # an unfinished download has none
        pass
    count = 0
    try:
        with gopen(url) as file, tarfile.open(fileobj=file, mode='r:' if os.path.isfile(url) else 'r|') as tar:
            for member in tar:
                count += member.name.lower().rpartition('.')[2] in PICTURES
    except (OSError, tarfile.TarError) as error:
        if not count:
            raise ValueError(f'{url} is not a readable tar ({str(error)[:100]}): download it again or leave it '
                             f'out of data.train') from None
    return count


def read_shard(url: str) -> Iterator[tuple[io.BytesIO, str]]:
    """(encoded picture, raw caption) of a shard's samples that have a picture, in their order.

    Raises:
        Exception: whatever webdataset meets in a damaged shard, after the samples before the damage.
    """
    for sample in tarfile_samples([{'url': url}]):
        kind = next((kind for kind in PICTURES if kind in sample), None)
        if kind:
            picture = io.BytesIO(sample[kind])
            picture.name = f'{url}/{sample["__key__"]}.{kind}'
            yield picture, caption_of(sample)


def caption_of(sample: dict) -> str:
    if 'txt' in sample:
        return sample['txt'].decode(errors='replace')
    with suppress(KeyError, ValueError, AttributeError):
        return json.loads(sample['json']).get('caption') or ''
    return ''


class ShardDataset:
    """The pairs of img2dataset's tars, in place of a `PairDataset`.

    Launched on several processes, each counts some of the shards.

    Args:
        source: what `list_shards` takes.

    Raises:
        FileNotFoundError, ValueError: a shard is missing, cannot be read, or all are empty.
    """

    def __init__(self, source: str, transform: train_transform, max_words: int, seed: int = 0):
        self.transform, self.max_words, self.seed, self.epoch = transform, max_words, seed, 0
        self.urls = list_shards(source)
        mine = progress(self.urls[rank()::world_size()], desc='counting shards')
        parts = gather_objects([count_pictures(url) for url in mine])
        self.counts = np.array([parts[i % world_size()][i // world_size()] for i in range(len(self.urls))])
        self.first = np.cumsum(self.counts) - self.counts  # number of each shard's first sample
        if not len(self):
            raise ValueError(f'{source} holds no picture: its downloads failed')

    def __len__(self) -> int:
        return int(self.counts.sum())

    def examples(self, count: int) -> list[io.BytesIO]:
        """Pictures to be looked at, from the start of the set."""
        return [sample.picture for sample in islice(self.rows(range(len(self.urls)), 0, len(self)), count)]

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
                for index, (picture, caption) in enumerate(islice(read_shard(url), min(wanted, self.counts[shard]))):
                    wanted -= 1
                    yield Sample(picture, caption, int(self.first[shard]) + index, lost)
            except Exception as error:  # webdataset lets through what files, pipes and tars raise
                problem = repr(error)[:120]
            if not wanted:
                return
            lost = lost or (url, 'damaged', f'{wanted} samples of {url} are lost: {problem}')
            barren = barren + 1 if wanted == before else 0
            if barren == len(order):
                raise ValueError(f'none of the {len(order)} shards can be read: {lost[2]}')


class ShardStream(IterableDataset):
    """The items (see `first_readable`) of a process's batches `start_step` up to `steps` of the dataset's epoch.

    Batch k of a process is made by its worker k modulo their number. With another number of processes or workers the
    epoch is cut into other runs: a run that is resumed within an epoch then sees some of its samples twice and others
    not before the next.
    """

    def __init__(self, dataset: ShardDataset, batch_size: int, steps: int, start_step: int, rank: int):
        self.dataset, self.batch_size, self.steps = dataset, batch_size, steps
        self.start_step, self.rank = start_step, rank

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        lane = (self.start_step + worker) % workers  # the loader asks worker 0 first
        before, size = (sum(len(range(other, self.steps, workers)) for other in range(lane)),
                        len(range(lane, self.steps, workers)))
        done = len(range(lane, self.start_step, workers))
        first = (self.rank * self.steps + before) * self.batch_size
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
                np.random.default_rng((*seeds, start)).shuffle(window)
                for place in range(done, len(window)):
                    pairs = ((sample.picture, sample.caption, sample.number)  # the next in the window stand in
                             for sample in window[place:] + window[:place] if clean_caption(sample.caption, 1))
                    sample = window[place]
                    item = first_readable(pairs, dataset.transform, dataset.max_words, *seeds, sample.number)
                    item['bad'] += [sample.lost] if sample.lost else []
                    yield item
                done = 0
