"""`data.train` of pre-training: an all.json, tars or an annotated folder."""

import os

from data.datasets import AnnotatedTrain, Captioned, PairDataset
from data.shards import ShardDataset, is_shards
from data.transforms import TrainTransform


def open_pairs(source: str, transform: TrainTransform, max_words: int, seed: int) -> Captioned | ShardDataset:
    """The pairs of an all.json, of tars (`list_shards`) or of the training split of an annotated folder.

    Raises:
        FileNotFoundError, ValueError: it is not there, or not what it looks like.
    """
    kind = ShardDataset if is_shards(source) else AnnotatedTrain if os.path.isdir(source) else PairDataset
    return kind(source, transform, max_words, seed)
