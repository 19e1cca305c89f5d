"""Read Flickr30K's annotation: Karpathy's JSON (which Kaggle's pictures need too) or BLIP's three JSONs."""

import json
from dataclasses import dataclass
from pathlib import Path

SPLITS = ('train', 'val', 'test')
FOLDERS = ('flickr30k-images', 'flickr30k_images', 'images')


@dataclass(frozen=True)
class Picture:
    """A picture and its captions."""

    path: Path
    captions: tuple[str, ...]


def read_karpathy(content: dict, split: str) -> dict[str, list[str]]:
    """Captions by file name."""
    return {entry['filename']: [sentence['raw'] for sentence in entry['sentences']]
            for entry in content['images'] if entry['split'] == split}


def read_blip(content: list[dict], split: str) -> dict[str, list[str]]:
    """Captions by file name; a record holds one of a picture's captions (train) or all of them."""
    captions: dict[str, list[str]] = {}
    for record in content:
        texts = record['caption']
        captions.setdefault(record['image'], []).extend([texts] if isinstance(texts, str) else texts)
    return captions


def load_flickr(root: str | Path, split: str) -> list[Picture]:
    """The pictures of a split, in the order of the annotation.

    Raises:
        FileNotFoundError: the folder, the annotation or the pictures are missing; says what was looked for.
        ValueError: unknown split, broken or empty annotation, or results.csv alone, which has no split.
    """
    root = Path(root)
    if split not in SPLITS:
        raise ValueError(f'unknown split {split!r}: one of {", ".join(SPLITS)}')
    if not root.is_dir():
        raise FileNotFoundError(f'no Flickr30K folder {root}: set data.root to it (README, "Flickr30K")')
    karpathy, blip = root / 'dataset_flickr30k.json', root / f'flickr30k_{split}.json'
    if karpathy.exists():
        source, read = karpathy, read_karpathy
    elif blip.exists():
        source, read = blip, read_blip
    elif (root / 'results.csv').exists():
        raise ValueError(f'{root / "results.csv"} has captions but no split: put Karpathy\'s dataset_flickr30k.json '
                         f'beside it')
    else:
        raise FileNotFoundError(f'no annotation in {root}: looked for {karpathy.name} and {blip.name}')
    try:
        captions = read(json.loads(source.read_text(encoding='utf-8')), split)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{source} is not the annotation its name says ({error!r}): download it again') from None
    if not captions:
        raise ValueError(f'{source} lists no pictures of split {split!r}: download it again')
    folder = picture_folder(root)
    return [Picture(folder / Path(name).name, tuple(texts)) for name, texts in captions.items()]


def picture_folder(root: Path) -> Path:
    for name in FOLDERS:
        for folder in (root / name / name, root / name):  # Kaggle's archive nests the folder
            if folder.is_dir():
                return folder
    raise FileNotFoundError(f'no pictures in {root}: looked for the folders {", ".join(FOLDERS)}')
