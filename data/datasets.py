"""Datasets: pre-training pairs of `all.json`, Flickr30K captions for finetuning, and held-out pictures.

Item i of epoch e is a function of (seed, e, i) alone, whatever the number of workers or processes, so that a resumed
run sees what the uninterrupted run saw.
"""

import hashlib
import json
import os
import random
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from data.flickr import Picture, load_flickr
from data.transforms import eval_transform, open_image, plain_transform, train_transform
from utils import atomic_write, logger

MAX_TRIES = 20  # items tried in place of a broken picture
COLUMNS = ('image_root', 'caption', 'id')
PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', ' '))


def clean_caption(text: str, max_words: int) -> str:
    """BLIP's `pre_caption`: lower case, punctuation and runs of white space to one blank, at most `max_words` words."""
    return ' '.join(text.lower().translate(PUNCTUATION).split()[:max_words])


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


class Captioned(torch.utils.data.Dataset):
    """Pictures with one caption each, for training.

    An item is a dict of image (float32 [3, S, S]), caption, id and bad: the (path, reason) of broken pictures that
    were met; the next readable pair stands in for them.

    Args:
        table: columns image_root (path), caption and id. Arrow keeps them outside python's reference counting, so
            that worker processes share them without copying.
        folder: what relative paths start from.

    Raises:
        FileNotFoundError: the pictures are not where the table says.
    """

    def __init__(self, table: pa.Table, folder: str | Path, transform: train_transform, max_words: int, seed: int):
        self.table, self.folder = table, folder
        self.transform, self.max_words, self.seed = transform, max_words, seed
        self.epoch = 0
        sample = [self.pair(index)[0] for index in range(0, len(self), max(1, len(self) // 16))]
        if not any(os.path.exists(path) for path in sample):
            raise FileNotFoundError(f'none of {len(sample)} pictures looked for is there, for example {sample[0]}: '
                                    f'were they moved since the annotation was written?')

    def __len__(self) -> int:
        return len(self.table)

    def pair(self, index: int) -> tuple[str, str, int]:
        """(path, raw caption, id) of pair `index`"""
        path, caption, number = (self.table[name][index].as_py() for name in COLUMNS)
        return os.path.join(self.folder, path), caption, number

    def draw_caption(self, path: str, caption: str) -> str:
        """The caption that an item trains on; may draw from python's generator, which is the item's own."""
        return caption

    def __getitem__(self, index: int) -> dict:
        bad: dict[str, str] = {}
        for offset in range(min(MAX_TRIES, len(self))):
            path, caption, number = self.pair((index + offset) % len(self))
            if path in bad:  # another caption of a broken picture
                continue
            try:
                picture = open_image(path, self.transform.min_size)
                break
            except (ValueError, FileNotFoundError) as error:
                bad[path] = str(error)
        else:
            raise ValueError(f'{len(bad)} pictures in a row cannot be read; the first: {next(iter(bad.values()))}')
        with seeded(self.seed, self.epoch, index):
            caption = clean_caption(self.draw_caption(path, caption), self.max_words)
            image, caption = self.transform(picture, caption)
        return {'image': image, 'caption': caption, 'id': number, 'bad': list(bad.items())}


class PairDataset(Captioned):
    """The pairs of an `all.json`, read through a memory-mapped index that is built once.

    Raises:
        FileNotFoundError, ValueError: the file or its pictures are missing; it is broken or has no caption.
    """

    def __init__(self, all_json: str | os.PathLike, transform: train_transform, max_words: int, seed: int = 0):
        source = Path(all_json)
        if not source.is_file():
            raise FileNotFoundError(f'no {source}: write it with json_dataset.py, or set data.train')
        self.index = build_index(source)
        table = read_index(self.index)
        if not len(table):
            raise ValueError(f'{source} holds no pair with a caption: run json_dataset.py again')
        super().__init__(table, source.parent, transform, max_words, seed)

    def __getstate__(self) -> dict:  # a worker process maps the index again instead of receiving its bytes
        return self.__dict__ | {'table': None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, table=read_index(state['index']))


def read_index(index: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(index))).read_all()


def made_from(index: Path) -> bytes | None:
    """What the index says of the file it was built from; None where there is no index or it is broken."""
    try:
        return (read_index(index).schema.metadata or {}).get(b'made_from')
    except (OSError, pa.ArrowInvalid):
        return None


def build_index(source: Path) -> Path:
    """The Arrow file with the pairs of `all.json` that have a caption; rebuilt when all.json changed.

    It lies beside all.json, or in the temporary folder when that one cannot be written.

    Raises:
        ValueError: not a list of {"caption", "image_root", "id"}.
    """
    stat = source.stat()
    stamp = f'{stat.st_size} bytes, {stat.st_mtime_ns} ns'.encode()
    private = hashlib.sha1(f'{Path.home()} {source.resolve()}'.encode()).hexdigest()[:16]  # of this user and file
    beside = source.with_name(f'{source.name}.arrow')
    places = beside, Path(tempfile.gettempdir()) / f'dlip-{private}.arrow'
    for index in places:
        if made_from(index) == stamp:
            return index
    try:
        records = json.loads(source.read_text(encoding='utf-8'))
        columns = {name: [record[name] for record in records] for name in COLUMNS}
        kept = [bool(clean_caption(caption, 1)) for caption in columns['caption']]
        schema = pa.schema({'image_root': pa.string(), 'caption': pa.string(), 'id': pa.int64()},
                           {'made_from': stamp})
        table = pa.table(columns, schema=schema).filter(pa.array(kept, pa.bool_()))
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise ValueError(f'{source} is not a list of {{"caption", "image_root", "id"}} ({error!r}): '
                         f'write it with json_dataset.py') from None
    if not all(kept):
        logger.info('%s: %d pairs without a caption are left out', source, len(kept) - sum(kept))
    index = places[not os.access(source.parent, os.W_OK)]
    with atomic_write(index, 'wb') as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table)
    return index


def with_captions(pictures: list[Picture], source: str) -> list[Picture]:
    """Leave out empty captions, and pictures that have no other."""
    kept = [replace(picture, captions=tuple(text for text in picture.captions if clean_caption(text, 1)))
            for picture in pictures]
    empty = sum(len(old.captions) - len(new.captions) for old, new in zip(pictures, kept, strict=True))
    kept = [picture for picture in kept if picture.captions]
    if empty or len(kept) < len(pictures):
        logger.info('%s: %d empty captions and %d pictures without one are left out', source, empty,
                    len(pictures) - len(kept))
    if not kept:
        raise ValueError(f'{source} holds no caption: download its annotation again')
    return kept


class FlickrTrain(Captioned):
    """Flickr30K's training pictures, one item per caption; the captions of a picture share its id.

    Args:
        teacher_share: the probability that an item has its picture's caption of `teacher_captions` instead.

    Attributes:
        teacher_captions: by file name; a picture without one keeps its own captions.
    """

    def __init__(self, root: str | os.PathLike, transform: train_transform, max_words: int, seed: int = 0,
                 teacher_share: float = 0.0):
        if not 0 <= teacher_share <= 1:
            raise ValueError(f'data.teacher_captions is a probability between 0 and 1, got {teacher_share}')
        self.teacher_share, self.teacher_captions = teacher_share, {}
        pictures = with_captions(load_flickr(root, 'train'), f'{root}, split train')
        rows = [(str(picture.path), text, number) for number, picture in enumerate(pictures)
                for text in picture.captions]
        super().__init__(as_table(rows), '', transform, max_words, seed)

    def draw_caption(self, path: str, caption: str) -> str:
        if self.teacher_captions and random.random() < self.teacher_share:
            return self.teacher_captions.get(Path(path).name, caption)
        return caption


class FlickrPictures(Captioned):
    """Flickr30K's training pictures, one item each, whole as evaluation sees them; the id is the picture's number.

    Attributes:
        references: per picture its captions.
    """

    def __init__(self, root: str | os.PathLike, image_size: int, max_words: int):
        pictures = with_captions(load_flickr(root, 'train'), f'{root}, split train')
        self.references = [list(picture.captions) for picture in pictures]
        rows = [(str(picture.path), picture.captions[0], number) for number, picture in enumerate(pictures)]
        super().__init__(as_table(rows), '', plain_transform(image_size), max_words, seed=0)


def as_table(rows: list[tuple[str, str, int]]) -> pa.Table:
    return pa.table(dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))


class ImageTextEval(torch.utils.data.Dataset):
    """Held-out pictures with all their captions; item i is the transformed picture i (float32 [3, S, S]).

    No picture may be missing or broken here: the metrics would be of another set than they say.

    Attributes:
        texts: all captions, cleaned, picture by picture.
        image_to_texts: per picture the indices of its captions in `texts`; text_to_image: the reverse.
        references: per picture its captions as they were written.
    """

    def __init__(self, root: str | os.PathLike, split: str, transform: eval_transform, max_words: int):
        self.root, self.split, self.transform = Path(root), split, transform
        pictures = with_captions(load_flickr(root, split), f'{root}, split {split}')
        self.paths = [picture.path for picture in pictures]
        missing = [path for path in self.paths if not path.exists()]
        if missing:
            raise FileNotFoundError(f'{len(missing)} of the {len(self.paths)} pictures of split {split} are missing, '
                                    f'for example {missing[0]}')
        self.references = [list(picture.captions) for picture in pictures]
        self.texts = [clean_caption(text, max_words) for texts in self.references for text in texts]
        self.text_to_image = [i for i, texts in enumerate(self.references) for _ in texts]
        self.image_to_texts: list[list[int]] = [[] for _ in pictures]
        for text, image in enumerate(self.text_to_image):
            self.image_to_texts[image].append(text)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(open_image(self.paths[index]))
