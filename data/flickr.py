"""Annotated pictures for finetuning and evaluation: Flickr30K and COCO in their published layouts, or one's own.

The annotation is the first of these in the folder:

    dataset_flickr30k.json, dataset_coco.json    Karpathy's (its split restval counts as train)
    flickr30k_train.json, _val.json, _test.json  BLIP's
    results.csv                                  Kaggle's, also inside its folder of pictures; it has no split
    one other .csv or .jsonl file                columns image, caption and, if need be, split; a row per caption
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.captions import storable

SPLITS = ('train', 'val', 'test')
HELD_OUT = {'test': 1000 / 31014, 'val': 1014 / 31014}  # shares of the standard split of Flickr30K
FOLDERS = ('flickr30k-images', 'flickr30k_images', 'images')
Row = tuple[str, list[str], str | None]  # picture as the annotation names it, captions, split


@dataclass(frozen=True)
class Picture:
    """A picture and its captions."""

    path: Path
    captions: tuple[str, ...]


def read_karpathy(path: Path) -> Iterator[Row]:
    for entry in json.loads(path.read_text(encoding='utf-8'))['images']:
        split = 'train' if entry['split'] == 'restval' else entry['split']
        yield str(Path(entry.get('filepath', ''), entry['filename'])), [s['raw'] for s in entry['sentences']], split


def read_blip(path: Path) -> Iterator[Row]:
    """A record holds one of a picture's captions (train) or all of them."""
    for record in json.loads(path.read_text(encoding='utf-8')):
        texts = record['caption']
        yield record['image'], [texts] if isinstance(texts, str) else texts, path.stem.rpartition('_')[2]


def read_results(path: Path) -> Iterator[Row]:
    """`image_name| comment_number| comment`; in the published file one line lacks its second bar."""
    lines = path.read_text(encoding='utf-8').split('\n')[1:]
    for line in filter(str.strip, lines):
        name, rest = line.split('|', 1)
        yield name.strip(), [rest.strip().lstrip('0123456789').lstrip(' |').strip()], None


def read_table(path: Path) -> Iterator[Row]:
    """One's own CSV (with a header line) or JSON lines; a caption of JSON may be a list of them."""
    with open(path, encoding='utf-8-sig', newline='') as file:
        records = csv.DictReader(file) if path.suffix == '.csv' else map(json.loads, filter(str.strip, file))
        for record in records:
            texts = record['caption']
            yield record['image'], [texts] if isinstance(texts, str) else texts, record.get('split') or None


def find_annotation(root: Path) -> tuple[list[Path], type(read_table)]:
    """The files of the annotation and their reader.

    Raises:
        FileNotFoundError, ValueError: there is none; there is more than one table.
    """
    blip = [root / f'flickr30k_{split}.json' for split in SPLITS]
    known = [([root / 'dataset_flickr30k.json'], read_karpathy), ([root / 'dataset_coco.json'], read_karpathy),
             (blip, read_blip), ([folder / 'results.csv' for folder in (root, *(root / name for name in FOLDERS))],
                                 read_results)]
    for files, read in known:
        there = [file for file in files if file.is_file()]
        if there:
            return there if read is read_blip else there[:1], read
    tables = sorted(path for path in root.iterdir() if path.suffix in ('.csv', '.jsonl'))
    if len(tables) > 1:
        raise ValueError(f'{root} holds {len(tables)} tables ({", ".join(path.name for path in tables)}): leave '
                         f'the one with the captions')
    if not tables:
        raise FileNotFoundError(f'no annotation in {root}: looked for dataset_flickr30k.json, dataset_coco.json, '
                                f'flickr30k_{{train,val,test}}.json, results.csv and one .csv or .jsonl file')
    return tables, read_table


def hash_split(names: list[str]) -> dict[str, str]:
    """Split of each picture by the hash of its name: as many, in proportion, as the standard split of Flickr30K has.

    At least one picture is held out for val and for test.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(Path(name).name.encode()).digest())
    splits = dict.fromkeys(names, 'train')
    for split, share in HELD_OUT.items():
        count = max(1, round(share * len(names)))
        splits |= dict.fromkeys(order[:count], split)
        order = order[count:]
    return splits


def load_flickr(root: str | Path, split: str, how: str = 'standard') -> list[Picture]:
    """The pictures of a split, in the order of the annotation.

    Args:
        how: 'standard', the split that the annotation carries (one's own table without a split is split by hash);
            'hash', by the pictures' names whatever the annotation says (`hash_split`).

    Raises:
        FileNotFoundError: the folder, the annotation or the pictures are missing; says what was looked for.
        ValueError: unknown split, broken or empty annotation, or results.csv alone, which has no split.
    """
    root = Path(root)
    if split not in SPLITS:
        raise ValueError(f'unknown split {split!r}: one of {", ".join(SPLITS)}')
    if how not in ('standard', 'hash'):
        raise ValueError(f'data.split: {how!r} is neither standard nor hash')
    if not root.is_dir():
        raise FileNotFoundError(f'no Flickr30K folder {root}: set data.root to it (README, "Flickr30K")')
    files, read = find_annotation(root)
    if read is read_results and how == 'standard':
        raise ValueError(f'{files[0]} has captions but no split: put Karpathy\'s dataset_flickr30k.json beside it, or '
                         f'split by file name with data.split=hash')
    captions: dict[str, list[str]] = {}
    splits: dict[str, str | None] = {}
    source = files[0]
    try:
        for source in files:
            for name, texts, its_split in read(source):
                captions.setdefault(name, []).extend(storable(text) for text in texts)
                splits[name] = its_split
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        remedy = 'it needs the columns image and caption, in UTF-8' if read is read_table else 'download it again'
        raise ValueError(f'{source} is not the annotation its name says ({error!r}): {remedy}') from None
    if how == 'hash' or (read is read_table and not any(splits.values())):
        splits = hash_split(list(captions))
    elif read is read_table and not set(splits.values()) <= set(SPLITS):
        wrong = next(name for name, its_split in splits.items() if its_split not in SPLITS)
        raise ValueError(f'{source}: split {splits[wrong]!r} of {wrong} is none of {", ".join(SPLITS)}')
    chosen = [name for name in captions if splits[name] == split]
    if not chosen:
        raise ValueError(f'{source} lists no pictures of split {split!r}: ' + (
            'three pictures are the least' if read is read_table else 'download it again'))
    paths = place_pictures(root, chosen)
    return [Picture(path, tuple(captions[name])) for path, name in zip(paths, chosen, strict=True)]


def place_pictures(root: Path, names: list[str]) -> list[Path]:
    """Paths of the pictures: as they are named, below the root or `images`, or else by file name in Flickr30K's folder.

    Raises:
        FileNotFoundError: no such folder.
    """
    for folder in (root, root / 'images'):
        if any((folder / name).is_file() for name in names[:20]):
            return [folder / name for name in names]
    for name in FOLDERS:
        for folder in (root / name / name, root / name):  # Kaggle's archive nests the folder
            if folder.is_dir():
                return [folder / Path(name).name for name in names]
    raise FileNotFoundError(f'no pictures in {root}: looked for {names[0]} and the folders {", ".join(FOLDERS)}')
