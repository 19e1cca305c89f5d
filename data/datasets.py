"""Datasets: pre-training pairs of `all.json`, Flickr30K captions for finetuning, and held-out pictures.

Item i of epoch e is a function of (seed, e, i) alone, whatever the number of workers or processes, so that a resumed
run sees what the uninterrupted run saw.
"""

import json
import os
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from data.flickr import load_flickr
from data.transforms import eval_transform, open_image, train_transform
from utils import atomic_write, logger

MAX_TRIES = 20  # neighbours tried in place of a broken picture


def clean_caption(text: str, max_words: int) -> str:
    """BLIP's `pre_caption`: lower case, punctuation and runs of white space to one blank, at most `max_words` words."""
    text = re.sub(r'[.!"()*#:;~]', ' ', text.lower())
    return ' '.join(text.split()[:max_words])


class Captioned(torch.utils.data.Dataset):
    """Pictures with one caption each, for training. Subclasses say what pair `index` is.

    An item is a dict of image (float32 [3, S, S]), caption, id and bad: the (path, reason) of broken pictures that
    were met; the next readable pair stands in for them.
    """

    def __init__(self, transform: train_transform, max_words: int, seed: int):
        self.transform, self.max_words, self.seed = transform, max_words, seed
        self.epoch = 0

    def pair(self, index: int) -> tuple[str, str, int]:
        """(path, raw caption, id) of pair `index`"""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        bad = []
        for offset in range(min(MAX_TRIES, len(self))):
            path, caption, number = self.pair((index + offset) % len(self))
            try:
                picture = open_image(path)
                break
            except (ValueError, FileNotFoundError) as error:
                bad.append((str(path), str(error)))
        else:
            raise ValueError(f'{len(bad)} pictures in a row cannot be read; the first: {bad[0][1]}')
        drawn = int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])
        states = random.getstate(), torch.get_rng_state()
        random.seed(drawn)
        torch.default_generator.manual_seed(drawn)  # torch.manual_seed would also queue a call for an absent GPU
        image, caption = self.transform(picture, clean_caption(caption, self.max_words))
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        return {'image': image, 'caption': caption, 'id': number, 'bad': bad}


class PairDataset(Captioned):
    """The pairs of an `all.json`, read through a memory-mapped index beside it that is built once.

    Raises:
        FileNotFoundError, ValueError: the file is missing, broken, or has no pair with a caption.
    """

    def __init__(self, all_json: str | os.PathLike, transform: train_transform, max_words: int, seed: int = 0):
        super().__init__(transform, max_words, seed)
        self.source = Path(all_json)
        if not self.source.is_file():
            raise FileNotFoundError(f'no {self.source}: write it with json_dataset.py, or set data.train')
        self.table = pa.ipc.open_file(pa.memory_map(str(build_index(self.source)))).read_all()
        if not len(self.table):
            raise ValueError(f'{self.source} holds no pair with a caption: run json_dataset.py again')

    def __len__(self) -> int:
        return len(self.table)

    def pair(self, index: int) -> tuple[str, str, int]:
        path, caption, number = (self.table[name][index].as_py() for name in ('image_root', 'caption', 'id'))
        return os.path.join(self.source.parent, path), caption, number


def build_index(source: Path) -> Path:
    """An Arrow file with the pairs of `all.json` that have a caption; rebuilt when all.json changed."""
    stat = source.stat()
    name = f'{source.stem}.{stat.st_size}.{stat.st_mtime_ns}.arrow'
    folder = source.parent if os.access(source.parent, os.W_OK) else Path(tempfile.gettempdir())
    index = folder / name
    if index.exists():
        return index
    try:
        records = json.loads(source.read_text(encoding='utf-8'))
        columns = {key: [record[key] for record in records] for key in ('image_root', 'caption', 'id')}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{source} is not a list of {{"caption", "image_root", "id"}} ({error!r}): '
                         f'write it with json_dataset.py') from None
    kept = [bool(clean_caption(caption, 1)) for caption in columns['caption']]
    if not all(kept):
        logger.info('%s: %d pairs without a caption are left out', source, len(kept) - sum(kept))
    table = pa.table({'image_root': pa.array(columns['image_root'], pa.string()),
                      'caption': pa.array(columns['caption'], pa.string()),
                      'id': pa.array(columns['id'], pa.int64())}).filter(pa.array(kept, pa.bool_()))
    with atomic_write(index, 'wb') as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for stale in folder.glob(f'{source.stem}.*.arrow'):
        if stale != index:
            stale.unlink(missing_ok=True)
    return index


class FlickrTrain(Captioned):
    """Flickr30K's training pictures, one item per caption; the captions of a picture share its id."""

    def __init__(self, root: str | os.PathLike, transform: train_transform, max_words: int, seed: int = 0):
        super().__init__(transform, max_words, seed)
        self.pairs = [(picture.path, caption, number) for number, picture in enumerate(load_flickr(root, 'train'))
                      for caption in picture.captions if clean_caption(caption, 1)]

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, index: int) -> tuple[str, str, int]:
        return self.pairs[index]


class ImageTextEval(torch.utils.data.Dataset):
    """Held-out pictures with all their captions; item i is the transformed picture i (float32 [3, S, S]).

    Attributes:
        texts: all captions, cleaned, picture by picture.
        image_to_texts: per picture the indices of its captions in `texts`; text_to_image: the reverse.
        references: per picture its captions as they were written.
    """

    def __init__(self, root: str | os.PathLike, split: str, transform: eval_transform, max_words: int):
        self.root, self.split, self.transform = Path(root), split, transform
        pictures = load_flickr(root, split)
        self.paths = [picture.path for picture in pictures]
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
