"""Datasets: the pre-training pairs of `all.json`, the images of annotated folders, and held-out images.

Item i of epoch e is a function of (seed, e, i) alone, whatever the number of workers or processes, so that a resumed
run sees what the uninterrupted run saw.
"""

import os
import random
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from data.annotations import AnnotatedImage, load_annotated
from data.captions import clean_caption, is_empty
from data.distributed import barrier, local_rank
from data.images import BrokenImage, file_name, open_image, open_part
from data.index import COLUMNS, build_index, read_index
from data.transforms import EvalTransform, TrainTransform, WholeTransform
from utils import logger, shorten

MOST_HELD_OUT = 1000  # images: enough for a curve, and quick to evaluate
MAX_TRIES = 20  # consecutive broken images that end the run


@contextmanager
def seeded(*parts: int):
    """Seed python's and torch's generators from integers for a block, and put them back after it."""
    drawn = int(np.random.SeedSequence(parts).generate_state(1)[0])
    states = random.getstate(), torch.get_rng_state()
    random.seed(drawn)
    torch.default_generator.manual_seed(drawn)  # torch.manual_seed would also queue a call for an absent GPU
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])


def first_readable(pairs: Iterable[tuple], transform: TrainTransform, max_words: int, *seeds: int) -> dict:
    """The first of some pairs whose image can be read, as a training item.

    An item is a dict of image (uint8 [3, S, S]), caption, id and bad: (path, kind, message) of each broken image that
    was skipped before it.

    Args:
        pairs: (path or open file, raw caption, id), in the order in which they replace each other.
        seeds: of the item's random numbers.

    Raises:
        ValueError: too many images in a row are broken; names the first.
    """
    bad: dict[str, tuple[str, str, str]] = {}
    for file, caption, number in pairs:
        path = file_name(file)
        if path in bad:  # another caption of a broken image
            continue
        try:
            with seeded(*seeds):
                image, caption = transform(open_part(file, transform.crop, transform.image_size, transform.memory),
                                           clean_caption(caption, max_words))
            return {'image': image, 'caption': caption, 'id': number, 'bad': list(bad.values())}
        except FileNotFoundError as error:
            bad[path] = path, 'missing', str(error)
        except BrokenImage as error:
            bad[path] = path, error.kind, str(error)
        if len(bad) == MAX_TRIES:
            break
    first = next((message for _, _, message in bad.values()), 'no pair has a caption')
    raise ValueError(f'{len(bad)} images in a row cannot be read; the first: {first}')


class Captioned(torch.utils.data.Dataset):
    """Images with one caption each, for training; the captions of an image share its id.

    An item is that of `first_readable`: the next pair with a readable image replaces a broken one.

    Args:
        table: columns image_root (path, in bytes: no file system promises UTF-8), caption and id. Arrow keeps them
            outside python's reference counting, so that worker processes share them without copying.
        folder: what relative paths start from.

    Raises:
        FileNotFoundError: the images are not where the table says.
    """

    def __init__(self, table: pa.Table, folder: str | Path, transform: TrainTransform, max_words: int, seed: int):
        self.table, self.folder = table, folder
        self.transform, self.max_words, self.seed = transform, max_words, seed
        self.epoch, self.missing = 0, np.empty(0, np.int64)  # rows that are held out
        sample = self.examples(16)
        if not any(os.path.exists(path) for path in sample):
            raise FileNotFoundError(f'none of {len(sample)} images looked for is there, for example {sample[0][:300]}: '
                                    f'were they moved since the annotation was written?')

    def __len__(self) -> int:
        return len(self.table)

    def hold_out(self, share: float) -> list[tuple[str, str]]:
        """Take a share of the images out of the set, with all their pairs, by the hash of their ids: at most
        `MOST_HELD_OUT`, and none where it comes to less than two.

        Returns:
            a (path, raw caption) of each.
        """
        ids = self.table['id'].to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        hashes, first = np.unique(ids, return_index=True)
        count = held_out_count(share, len(hashes))
        if not count:
            return []
        held_out = [self.pair(int(i))[:2] for i in first[:count]]
        self.missing = np.flatnonzero(ids <= hashes[count - 1])
        self.table = without(self.table, self.missing)
        return held_out

    def pair(self, index: int) -> tuple[str, str, int]:
        """(path, raw caption, id) of pair `index`"""
        path, caption, number = (self.table[name][index].as_py() for name in COLUMNS)
        return os.path.join(self.folder, os.fsdecode(path)), caption, number

    def __getitem__(self, index: int) -> dict:
        following = (self.pair((index + offset) % len(self)) for offset in range(len(self)))
        return first_readable(following, self.transform, self.max_words, self.seed, self.epoch, index)

    def examples(self, count: int) -> list[str]:
        """Image files to look at, spread over the set."""
        count = min(count, len(self))
        return [self.pair(i * len(self) // count)[0] for i in range(count)]


def held_out_count(share: float, total: int) -> int:
    count = min(MOST_HELD_OUT, round(share * total))
    return count if count > 1 else 0


def without(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The table less some of its rows (ascending); nothing is copied."""
    edges = [-1, *rows.tolist(), len(table)]
    return pa.concat_tables([table.slice(a + 1, b - a - 1) for a, b in pairwise(edges) if b - a > 1])


class PairDataset(Captioned):
    """The pairs of an `all.json`, read through a memory-mapped index that is built once.

    Raises:
        FileNotFoundError, ValueError: the file or its images are missing; it is broken or has no caption.
    """

    def __init__(self, all_json: str | os.PathLike, transform: TrainTransform, max_words: int, seed: int = 0):
        source = Path(all_json)
        if not os.path.isfile(source):
            raise FileNotFoundError(f'no {shorten(source)}: write it with json_dataset.py, or set data.train')
        if local_rank() == 0:  # one process of a machine builds it, the others wait
            build_index(source)
        barrier()
        self.index = build_index(source)
        table = read_index(self.index)
        if not len(table):
            raise ValueError(f'{source} holds no pair with a caption: run json_dataset.py again')
        super().__init__(table, source.parent, transform, max_words, seed)

    def __getstate__(self) -> dict:  # a worker process maps the index again instead of receiving its bytes
        return self.__dict__ | {'table': None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, table=without(read_index(state['index']), state['missing']))


def with_captions(images: list[AnnotatedImage], source: str) -> list[AnnotatedImage]:
    """Leave out empty captions, and images that have no other."""
    kept = [replace(image, captions=tuple(text for text in image.captions if not is_empty(text))) for image in images]
    empty = sum(len(old.captions) - len(new.captions) for old, new in zip(images, kept, strict=True))
    kept = [image for image in kept if image.captions]
    if empty or len(kept) < len(images):
        logger.info('%s: %d empty captions and %d images without one are left out', source, empty,
                    len(images) - len(kept))
    if not kept:
        raise ValueError(f'{source} holds no caption: download its annotation again')
    return kept


class AnnotatedTrain(Captioned):
    """The training images of an annotated folder, one item per caption.

    Root and `how` are those of `load_annotated`.

    Args:
        teacher_share: the probability that an item has its image's caption of `teacher_captions` instead of its own,
            drawn anew each epoch.

    Attributes:
        teacher_captions: by path; an image that is not among them keeps its own captions.
    """

    def __init__(self, root: str | os.PathLike, transform: TrainTransform, max_words: int, seed: int = 0,
                 how: str | float = 'standard', teacher_share: float = 0.0):
        if not 0 <= teacher_share <= 1:
            raise ValueError(f'data.teacher_captions is a probability between 0 and 1, got {teacher_share}')
        self.teacher_share, self.teacher_captions = teacher_share, {}
        images = with_captions(load_annotated(root, 'train', how), f'{root}, split train')
        rows = [(image.path, text, number) for number, image in enumerate(images) for text in image.captions]
        super().__init__(as_table(rows), '', transform, max_words, seed)

    def pair(self, index: int) -> tuple[str, str, int]:
        path, caption, number = super().pair(index)
        if self.teacher_captions and random.Random(f'{self.seed} {self.epoch} {index}').random() < self.teacher_share:
            caption = self.teacher_captions.get(path, caption)
        return path, caption, number


class AnnotatedWhole(Captioned):
    """The same images, one item each, uncropped as in evaluation; the id is the image's index.

    Attributes:
        references: per image its captions.
    """

    def __init__(self, root: str | os.PathLike, image_size: int, max_words: int, how: str | float = 'standard'):
        images = with_captions(load_annotated(root, 'train', how), f'{root}, split train')
        self.references = [list(image.captions) for image in images]
        rows = [(image.path, image.captions[0], number) for number, image in enumerate(images)]
        super().__init__(as_table(rows), '', WholeTransform(image_size), max_words, seed=0)


def as_table(rows: list[tuple[Path, str, int]]) -> pa.Table:
    paths, captions, numbers = zip(*rows, strict=True)
    return pa.table([pa.array(map(os.fsencode, paths), pa.binary()), list(captions), list(numbers)], names=COLUMNS)


class ImageTextEval(torch.utils.data.Dataset):
    """Held-out images with all their captions; item i is the transformed image i (float32 [3, S, S]).

    No image may be missing or broken here: the metrics would describe another set.

    Attributes:
        texts: all captions, cleaned, image by image.
        image_to_texts: per image the indices of its captions in `texts`; text_to_image: the reverse.
        references: per image its captions as they were written.
    """

    def __init__(self, root: str | os.PathLike, split: str, transform: EvalTransform, max_words: int,
                 how: str | float = 'standard'):
        self.root, self.split, self.transform = Path(root), split, transform
        images = with_captions(load_annotated(root, split, how), f'{root}, split {split}')
        self.paths = [image.path for image in images]
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing:
            raise FileNotFoundError(f'{len(missing)} of the {len(self.paths)} images of split {split} are missing, '
                                    f'for example {str(missing[0])[:300]}')
        self.references = [list(image.captions) for image in images]
        self.texts = [clean_caption(text, max_words) for texts in self.references for text in texts]
        self.text_to_image = [i for i, texts in enumerate(self.references) for _ in texts]
        self.image_to_texts: list[list[int]] = [[] for _ in images]
        for text, image in enumerate(self.text_to_image):
            self.image_to_texts[image].append(text)

    @classmethod
    def from_config(cls, data: dict, split: str, image_size: int) -> 'ImageTextEval':
        """A split of a config's `data` settings."""
        transform = EvalTransform(image_size, data['image_memory'])
        return cls(data['root'], split, transform, data['max_words'], data['split'])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(open_image(self.paths[index], self.transform.memory))
