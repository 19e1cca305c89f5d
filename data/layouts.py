"""The layouts of annotated folders, as data sets are published and as people keep their own: a reader for each.

`LAYOUTS` lists them; the annotation of a folder is the first that is there.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data.scan import is_hidden, list_images
from data.tables import Row, encoding_of, read_json, read_table, read_text
from utils import logger, shorten

SPLITS = ('train', 'val', 'test')
ALSO_CALLED = {'training': 'train', 'restval': 'train', 'validation': 'val', 'valid': 'val', 'dev': 'val',
               'testing': 'test'} | {split: split for split in SPLITS}
KAGGLES = ['image_name', 'comment_number', 'comment']  # columns of Flickr30K there
FOLDERS = ('flickr30k-images', 'flickr30k_images', 'Flicker8k_Dataset', 'Flickr8k_Dataset', 'images', 'Images')


def image_folders(root: Path) -> list[Path]:
    """Where the images of an annotated folder may lie; archives of Kaggle nest a folder in one of its name."""
    return [root, *(root / name for name in FOLDERS), *(root / name / name for name in FOLDERS)]


@cache
def say(message: str) -> None:
    """Log a line once: every split of a folder reads its annotation."""
    logger.info(message)


# ---------------------------------------------------------------- a reader per layout

def read_karpathy(path: Path) -> Iterator[Row]:
    for entry in read_json(path)['images']:
        yield Row(str(Path(entry.get('filepath', ''), entry['filename'])), [s['raw'] for s in entry['sentences']],
                  entry['split'])


def read_blip(path: Path) -> Iterator[Row]:
    """A record holds one of an image's captions (train) or all of them."""
    for record in read_json(path):
        texts = record['caption']
        yield Row(record['image'], [texts] if isinstance(texts, str) else texts, path.stem.rpartition('_')[2])


def read_flickr8k(path: Path) -> Iterator[Row]:
    """`NAME.jpg#0<TAB>caption` (the authors') or a CSV file (Kaggle's), with the authors' list of each split, if there.

    One name of the published file ends in `.jpg.1`, and its image is not in the published archive.
    """
    lists = {split: find_files(path.parent, f'Flickr_8k.{split}Images.txt', folders=('', 'Flickr8k_text', '..'))
             for split in ('train', 'dev', 'test')}
    if any(lists.values()) and not all(lists.values()):
        raise ValueError(f'{path} needs all of Flickr_8k.{{train,dev,test}}Images.txt beside it, or none')
    splits = {name: split for split, files in lists.items() for file in files for name in read_text(file).split()}
    others = set()
    for name, captions, _, line in read_table(path) if path.name == 'captions.txt' else read_tokens(path):
        image = re.sub(r'(\.jpe?g)\.\d+$', r'\1', name)
        split = splits.get(name, splits.get(image))
        there = split or not splits and (image == name or any(
            os.path.isfile(folder / image) for place in path.parents[:2] for folder in image_folders(place)))
        if there:
            yield Row(image, captions, split, line)
        else:
            others.add(name)
    if others:
        say(f'{path}: {len(others)} images are left out, for example {min(others)}: '
            f'{"in none of its splits" if splits else "not there"}')


def read_tokens(path: Path) -> Iterator[Row]:
    for line, text in enumerate(read_text(path).split('\n'), 1):
        name, tab, caption = text.strip('\r').partition('\t')
        if not tab and text.strip():
            raise ValueError(f'{path}, line {line}: no tab between image and caption: {shorten(text)}')
        if tab:
            yield Row(name.rpartition('#')[0] or name, [caption], line=line)


def read_coco(path: Path) -> Iterator[Row]:
    """COCO's own: its images lie in train2014/ and the like."""
    content, split_and_year = read_json(path), path.stem.partition('_')[2]
    captions: dict = {image['id']: (image['file_name'], []) for image in content['images']}
    for number, annotation in enumerate(content['annotations']):
        image = annotation.get('image_id')
        if image not in captions:
            raise ValueError(f'{path}: annotations[{number}] is of image {shorten(image)}, which is not among '
                             f'its images')
        captions[image][1].append(annotation['caption'])
    for name, texts in captions.values():
        yield Row(f'{split_and_year}/{name}', texts, split_and_year[:-4])


def read_image_folder(path: Path) -> Iterator[Row]:
    """Hugging Face's: the names are relative to the table's folder; folders may be named by the split."""
    for name, captions, split, line in read_table(path):
        yield Row(str(path.parent / name), captions, split or split_of(Path(path.parent.name, name)), line)


def read_results(path: Path) -> Iterator[Row]:
    """Kaggle's Flickr30K, `image_name| comment_number| comment`; one published line lacks its second bar."""
    for line, text in enumerate(read_text(path).split('\n'), 1):
        name, bar, rest = text.partition('|')
        if text.strip() and not bar:
            raise ValueError(f'{path}, line {line}: no bar between image and caption: {shorten(text)}')
        if bar and line > 1:
            yield Row(name.strip(), [rest.strip().lstrip('0123456789').lstrip(' |').strip()], line=line)


def read_pairs(root: Path) -> Iterator[Row]:
    """Images with a text file of the same name beside them, a caption a line; folders may be named by the split."""
    lonely, broken = 0, []
    for path in list_images(root):
        text = os.path.splitext(path)[0] + '.txt'
        if not os.path.isfile(text):
            lonely += 1
            continue
        try:
            captions = read_text(text).splitlines()
        except (ValueError, OSError) as error:
            broken.append(str(error))
            continue
        yield Row(path, captions, split_of(Path(os.path.relpath(path, root))))
    if lonely or broken:
        say(f'{root}: {lonely} images have no text file, and {len(broken)} text files cannot be read'
            f'{f": {broken[0][:200]}" if broken else ""}')


def split_of(image: Path) -> str | None:
    """By a folder of the image that is named as a split is."""
    return next((part for part in image.parts[:-1] if part.lower() in ALSO_CALLED), None)


# ---------------------------------------------------------------- which layout

@dataclass(frozen=True)
class Layout:
    """Attributes:
        looks: its files, for messages.
        find: from a folder to its files of this layout, none or several.
        read: the rows of one of them.
        published: it comes with all its splits; otherwise those that are missing are made (`completed`).
        single: of several files each is an annotation of its own.
    """

    looks: str
    find: Callable[[Path], list[Path]]
    read: Callable[[Path], Iterator[Row]]
    published: bool = False
    single: bool = False


def find_files(root: Path, *names: str, folders: tuple[str, ...] = ('', 'Flickr8k_text')) -> list[Path]:
    """The file of each name in the first of the folders (in `root`) that has it."""
    there = ([root / folder / name for folder in folders if os.path.isfile(root / folder / name)] for name in names)
    return [paths[0] for paths in there if paths]


def files_named(*names: str, folders: tuple[str, ...] = ('',)) -> Callable[[Path], list[Path]]:
    return lambda root: find_files(root, *names, folders=folders)


def metadata(name: str) -> Callable[[Path], list[Path]]:
    """In the folder, or in one for each split."""
    return lambda root: [folder / name for folder in (root, *sorted(root.iterdir())) if os.path.isfile(folder / name)
                         and (folder == root or folder.name.lower() in ALSO_CALLED)]


def kaggles_results(root: Path) -> list[Path]:
    """results.csv, also among the images, unless by its header it is a table of one's own."""
    def is_kaggles(path: Path) -> bool:
        with open(path, encoding=encoding_of(path), errors='replace') as file:
            return [name.strip('\ufeff" \n') for name in file.readline(1000).split('|')] == KAGGLES
    return list(filter(is_kaggles, find_files(root, 'results.csv', folders=('', *FOLDERS))))


def own_tables(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.suffix.lower() in ('.csv', '.tsv', '.jsonl')
                  and path.is_file() and not is_hidden(path.name))


def pairs(root: Path) -> list[Path]:
    """The folder itself, if there is a text beside one of its images.

    Raises:
        ValueError: they are img2dataset's, whose failures are in its parquet files.
    """
    if any(root.glob('*_stats.json')):
        raise ValueError(f'{root} holds what img2dataset wrote: make an all.json of it with json_dataset.py')
    return [root] if any(os.path.isfile(os.path.splitext(path)[0] + '.txt') for path in list_images(root)) else []


LAYOUTS = (
    Layout('dataset_{flickr8k,flickr30k,coco}.json', files_named(
        'dataset_flickr8k.json', 'dataset_flickr30k.json', 'dataset_coco.json'), read_karpathy, True, single=True),
    Layout('flickr30k_{train,val,test}.json', files_named(*(f'flickr30k_{split}.json' for split in SPLITS)), read_blip,
           True),
    Layout('Flickr8k.token.txt', files_named('Flickr8k.token.txt', folders=('', 'Flickr8k_text')), read_flickr8k),
    *(Layout(f'captions_{{train,val}}{year}.json', files_named(
        f'captions_train{year}.json', f'captions_val{year}.json', folders=('', 'annotations')), read_coco)
      for year in (2014, 2017)),
    *(Layout(name, metadata(name), read_image_folder) for name in ('metadata.csv', 'metadata.jsonl')),
    Layout('captions.txt', files_named('captions.txt'), read_flickr8k),
    Layout('results.csv', kaggles_results, read_results),
    Layout('one .csv, .tsv or .jsonl file', own_tables, read_table, single=True),
    Layout('IMAGE.txt beside IMAGE.jpg', pairs, read_pairs))


def find_annotation(root: Path) -> tuple[list[Path], Layout]:
    """The files of a folder's annotation and their layout.

    Raises:
        FileNotFoundError, ValueError: there is none; there is more than one.
    """
    for layout in LAYOUTS:
        files = layout.find(root)
        if len(files) > 1 and layout.single:
            raise ValueError(f'{root} holds {len(files)} annotations ({", ".join(file.name for file in files)}): leave '
                             f'the one with the captions')
        if files:
            return files, layout
    raise FileNotFoundError(f'no annotation in {root}: looked for {", ".join(layout.looks for layout in LAYOUTS)}')
