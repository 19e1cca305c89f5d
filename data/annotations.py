"""Annotated folders: the images of a split with their captions. The layouts are those of `data.layouts`."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.captions import storable
from data.layouts import ALSO_CALLED, FOLDERS, SPLITS, Layout, find_annotation, image_folders, say
from data.tables import Row
from utils import shorten

HELD_OUT = {'test': 1000 / 31014, 'val': 1014 / 31014}  # shares of the standard split of Flickr30K


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and its captions."""

    path: Path
    captions: tuple[str, ...]


def by_hash(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(Path(name).name.encode(errors='surrogatepass')).digest())


def hash_split(names: list[str], share: float | None = None) -> dict[str, str]:
    """Split of each image by the hash of its name: as many, in proportion, as the standard split of Flickr30K has.

    At least one image is held out for val and for test.

    Args:
        share: of the images, held out for val, and as many for test, in the place of that proportion.
    """
    order, splits = by_hash(names), dict.fromkeys(names, 'train')
    for split, standard in HELD_OUT.items():
        count = max(1, round((share or standard) * len(names)))
        splits |= dict.fromkeys(order[:count], split)
        order = order[count:]
    return splits


def place(file: Path, line: int | None) -> str:
    return f'{file}, line {line}' if line else str(file)


def completed(splits: dict[str, str | None], source: Path, places: dict[str, tuple[Path, int | None]]
              ) -> dict[str, str]:
    """The splits of the images, where an annotation leaves some out: by the hash of the names, and said in the log.

    Without val and test, all three are made. Without val, it is a share of train; without test, a half of val.

    Args:
        places: file and line of each image.

    Raises:
        ValueError: an unknown split, or images without one beside others that have one; names the line.
    """
    if not any(splits.values()):
        made = hash_split(list(splits))
        how = 'has no split: its images are split by the hash of their names'
    else:
        made = {name: ALSO_CALLED.get((split or '').lower()) for name, split in splits.items()}
        wrong = next((name for name, split in made.items() if split is None), None)
        if wrong is not None:
            name, known = shorten(Path(wrong)), ', '.join(SPLITS)
            said = f'split {shorten(splits[wrong])} of {name} is none of {known}' if splits[wrong] else \
                f'{name} has no split, which others have: give it one of {known}'
            raise ValueError(f'{place(*places[wrong])}: {said}')
        counts = Counter(made.values())
        members = {split: by_hash(name for name in made if made[name] == split) for split in SPLITS}
        if counts['val'] and counts['test']:
            return made
        if counts['val']:
            made |= dict.fromkeys(members['val'][::2], 'test')
            how = 'has no test split: half of val serves as test, by the hash of the names'
        elif counts['test']:
            count = max(1, round(HELD_OUT['val'] * counts['train']))
            made |= dict.fromkeys(members['train'][:count], 'val')
            how = 'has no val split: a share of train serves as val, by the hash of the names'
        else:
            made = hash_split(list(splits))
            how = 'has no val and no test split: its images are split by the hash of their names'
    counts = Counter(made.values())
    say(f'{source} {how} ({", ".join(f"{counts[split]} {split}" for split in SPLITS)})')
    return made


def load_annotated(root: str | Path, split: str, how: str | float = 'standard') -> list[AnnotatedImage]:
    """The images of a split, in the order of the annotation.

    Args:
        how: 'standard', the split that the annotation carries (what it leaves out: see `completed`); 'hash', by the
            images' names whatever the annotation says (`hash_split`); a number, the same with this share.

    Raises:
        FileNotFoundError: the folder, the annotation or the images are missing; says what was looked for.
        ValueError: unknown split, or a broken or empty annotation: names the file, and the line or entry.
    """
    root = Path(root)
    if split not in SPLITS:
        raise ValueError(f'unknown split {shorten(split)}: one of {", ".join(SPLITS)}')
    if how not in ('standard', 'hash') and not isinstance(how, float):
        raise ValueError(f'data.split: {shorten(how)} is neither standard nor hash, nor a share')
    if not os.path.isdir(root):
        raise FileNotFoundError(f'no folder {shorten(root)}: data.root is one of images and their annotation '
                                f'(data/README.md, "Annotated folders")')
    files, layout = find_annotation(root)
    captions: dict[str, list[str]] = {}
    splits: dict[str, str | None] = {}
    places: dict[str, tuple[Path, int | None]] = {}  # file and line
    for file, row in ((source, row) for source in files for row in rows_of(source, layout)):
        if splits.get(row.image, row.split) != row.split:
            image, one, other = (shorten(Path(text or 'none')) for text in (row.image, splits[row.image], row.split))
            raise ValueError(f'{place(file, row.line)}: {image} is in split {other}, and before in split {one}')
        captions.setdefault(row.image, []).extend(map(storable, row.captions))
        splits[row.image], places[row.image] = row.split, (file, row.line)
    if how != 'standard':
        splits = hash_split(list(captions), how if how != 'hash' else None)
    elif captions and not layout.published:
        splits = completed(splits, files[0], places)
    chosen = [name for name in captions if ALSO_CALLED.get(splits[name]) == split]
    if not chosen:
        raise ValueError(f'{files[0]} lists no images of split {shorten(split)}: ' + (
            'download it again' if layout.published else 'three images are the least'))
    return [AnnotatedImage(path, tuple(captions[name]))
            for path, name in zip(place_images(root, chosen), chosen, strict=True)]


def rows_of(path: Path, layout: Layout) -> Iterator[Row]:
    """Raises:
        ValueError: the file is not what its name says; names the line or the entry.
    """
    count = 0
    try:
        for row in layout.read(path):
            row = row._replace(captions=[text for text in row.captions if text is not None])
            split = [] if row.split is None else [row.split]
            if not all(isinstance(text, str) for text in (row.image, *row.captions, *split)):
                raise TypeError(f'no text: {str(row)[:80]}')
            yield row
            count += 1
    except (KeyError, TypeError, AttributeError) as error:
        what = f'no {error}' if isinstance(error, KeyError) else str(error)[:120]
        raise ValueError(f'{path} is not the annotation its name says: entry {count + 1}: {what}. Download it again') \
            from None


def place_images(root: Path, names: list[str]) -> list[Path]:
    """Paths of the images: as they are named, or by file name, in the first of `image_folders` that has one of them.

    Raises:
        FileNotFoundError: none of the first 20 is there.
    """
    for tried in (names, [Path(name).name for name in names]):
        if len(set(tried)) < len(names):  # files of the same name in several folders
            continue
        for folder in image_folders(root):
            if any(os.path.isfile(folder / name) for name in tried[:20]):
                return [folder / name for name in tried]
    raise FileNotFoundError(f'no images in {root}: looked for {shorten(Path(names[0]))} in it and in the folders '
                            f'{", ".join(FOLDERS)}')
