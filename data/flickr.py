"""Read Flickr30K's annotation: Karpathy's JSON, BLIP's three JSONs, or Kaggle's results.csv beside Karpathy's split."""

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


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not valid JSON ({error}): download it again') from None


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
        captions = {entry['filename']: [s['raw'] for s in entry['sentences']]
                    for entry in read_json(karpathy)['images'] if entry['split'] == split}
    elif blip.exists():
        captions = {}
        for record in read_json(blip):
            texts = record['caption']
            captions.setdefault(record['image'], []).extend([texts] if isinstance(texts, str) else texts)
    elif (root / 'results.csv').exists():
        raise ValueError(f'{root / "results.csv"} has captions but no split: put Karpathy\'s dataset_flickr30k.json '
                         f'beside it')
    else:
        raise FileNotFoundError(f'no annotation in {root}: looked for {karpathy.name} and {blip.name}')
    if not captions:
        raise ValueError(f'{karpathy if karpathy.exists() else blip} lists no pictures of split {split!r}')
    folder = picture_folder(root)
    return [Picture(folder / Path(name).name, tuple(texts)) for name, texts in captions.items()]


def picture_folder(root: Path) -> Path:
    for name in FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f'no pictures in {root}: looked for the folders {", ".join(FOLDERS)}')
