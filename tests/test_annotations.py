"""Flickr30K: its annotation layouts, the finetuning set and the held-out pictures."""

import csv
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from test_datasets import TRANSFORM, write_pictures

from data import datasets
from data.annotations import AnnotatedImage, hash_split, load_annotated
from data.datasets import AnnotatedTrain, ImageTextEval
from data.images import open_part
from data.layouts import SPLITS
from data.transforms import eval_transform

CAPTIONS = {'train': [['A man.', 'a red DOG', ''], ['two cats']], 'val': [['a bus', 'the bus']],
            'test': [['x one', 'x two'], ['y one'], ['z', 'z z', 'z z z']]}


def flickr(root: Path, layout: str, folder: str = 'flickr30k-images') -> Path:
    entries = [(split, f'{split}{i}.jpg', texts) for split, group in CAPTIONS.items() for i, texts in enumerate(group)]
    write_pictures(root / folder, [name for _, name, _ in entries])
    if layout == 'karpathy':
        images = [{'filename': name, 'split': split, 'sentences': [{'raw': text} for text in texts]}
                  for split, name, texts in entries]
        (root / 'dataset_flickr30k.json').write_text(json.dumps({'images': images}))
    elif layout == 'blip':
        for wanted in CAPTIONS:
            records = [{'image': f'flickr30k-images/{name}', 'caption': texts} for split, name, texts in entries
                       if split == wanted]
            if wanted == 'train':
                records = [record | {'caption': text, 'image_id': record['image']} for record in records
                           for text in record['caption']]
            (root / f'flickr30k_{wanted}.json').write_text(json.dumps(records))
    elif layout == 'kaggle':
        lines = [f'{name}| {i}| {text} .' for _, name, texts in entries for i, text in enumerate(texts)]
        lines[-1] = lines[-1].replace('2| ', '2   ')  # as line 19,999 of the published file
        (root / 'results.csv').write_text('\n'.join(['image_name| comment_number| comment', *lines, '']))
    return root


@pytest.mark.parametrize('layout, folder', [('karpathy', 'flickr30k-images'), ('blip', 'images'),
                                            ('karpathy', 'flickr30k_images/flickr30k_images')])
def test_flickr_layouts(tmp_path, layout, folder, caplog):
    root = flickr(tmp_path, layout, folder)
    assert [list(p.captions) for p in load_annotated(root, 'test')] == CAPTIONS['test']
    assert [p.path for p in load_annotated(root, 'val')] == [root / folder / 'val0.jpg']
    with caplog.at_level(logging.INFO, 'dlip'):
        train = AnnotatedTrain(root, TRANSFORM, 30)
    assert '1 empty captions and 0 images without one' in caplog.text
    assert [(item['caption'], item['id']) for item in map(train.__getitem__, range(len(train)))] == \
        [('a man', 0), ('a red dog', 0), ('two cats', 1)]


def test_coco_in_karpathys_layout(tmp_path):
    write_pictures(tmp_path / 'val2014', ['a.jpg', 'b.jpg', 'c.jpg'])
    (tmp_path / 'dataset_coco.json').write_text(json.dumps({'images': [
        {'filepath': 'val2014', 'filename': name, 'split': split, 'sentences': [{'raw': f'of {name}'}]}
        for name, split in (('a.jpg', 'restval'), ('b.jpg', 'train'), ('c.jpg', 'test'))]}))
    assert load_annotated(tmp_path, 'train') == [AnnotatedImage(tmp_path / 'val2014/a.jpg', ('of a.jpg',)),
                                              AnnotatedImage(tmp_path / 'val2014/b.jpg', ('of b.jpg',))]
    assert [p.path.name for p in load_annotated(tmp_path, 'test')] == ['c.jpg']


def test_kaggles_table_is_split_by_hash_on_demand(tmp_path):
    root = flickr(tmp_path, 'kaggle', 'flickr30k_images/flickr30k_images')
    (root / 'results.csv').rename(root / 'flickr30k_images/results.csv')  # where the archive has it
    splits = {split: load_annotated(root, split, 'hash') for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [4, 1, 1]
    found = {p.path.name: p for pictures in splits.values() for p in pictures}
    assert set(found) == {f'{split}{i}.jpg' for split, group in CAPTIONS.items() for i in range(len(group))}
    assert found['test2.jpg'].captions == ('z .', 'z z .', 'z z z .') and all(p.path.is_file() for p in found.values())


def test_hash_split_has_the_standard_sizes_and_depends_on_names_only():
    names = [f'{i}.jpg' for i in range(31014)]
    splits = hash_split(names)
    assert Counter(splits.values()) == {'train': 29000, 'val': 1014, 'test': 1000}
    assert hash_split(names[::-1]) == splits
    assert Counter(hash_split(names[:3]).values()) == {'train': 1, 'val': 1, 'test': 1}


def own(root: Path, kind: str, split: bool) -> Path:
    """Pictures of one's own, in folders, with two captions each."""
    names = [f'{place}/{i}.png' for place in ('garden', 'house') for i in range(6)]
    for place in ('garden', 'house'):
        write_pictures(root / place, [f'{i}.png' for i in range(6)])
    records = [{'image': name, 'caption': f'{word}, "{name}" 🐕'} | ({'split': SPLITS[i % 3]} if split else {})
               for i, name in enumerate(names) for word in ('One', 'Two')]
    if kind == 'csv':
        with open(root / 'captions.csv', 'w', encoding='utf-8-sig', newline='') as file:  # as Excel saves it
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        merged = [a | {'caption': [a['caption'], b['caption']]} for a, b in zip(*[iter(records)] * 2, strict=True)]
        (root / 'mine.jsonl').write_text('\n'.join(map(json.dumps, merged)), encoding='utf-8')
    return root


@pytest.mark.parametrize('kind', ['csv', 'jsonl'])
@pytest.mark.parametrize('split', [True, False])
def test_pictures_of_ones_own(tmp_path, kind, split):
    root = own(tmp_path, kind, split)
    train = AnnotatedTrain(root, TRANSFORM, 30)
    held_out = {name: ImageTextEval(root, name, eval_transform(16), 30) for name in ('val', 'test')}
    assert [len(train), *map(len, held_out.values())] == ([8, 4, 4] if split else [20, 1, 1])
    name = held_out['val'].paths[0].relative_to(root)
    assert held_out['val'].texts[:2] == [f'{word}, {str(name).replace(".", " ")} 🐕' for word in ('one', 'two')]
    assert train[0]['image'].shape == held_out['test'][0].shape == (3, 16, 16)


def test_mistakes_in_ones_own_table(tmp_path):
    root = own(tmp_path, 'csv', True)
    table = root / 'captions.csv'
    good = table.read_text(encoding='utf-8-sig')
    for old, new, message in (('caption', 'words', "line 1: the header has no column caption; found 'image', 'words',"),
                              (',val', ',held', "split 'held' of garden/1.png is none of train, val, test"),
                              ('One,', 'One\\,', 'line')):
        table.write_text(good.replace(old, new), encoding='utf-8')
        if message != 'line':
            with pytest.raises(ValueError, match=f'captions.csv.*{message}'):
                load_annotated(root, 'test')
    (root / 'more.jsonl').touch()
    with pytest.raises(ValueError, match='holds 2 annotations .captions.csv, more.jsonl.: leave the one with'):
        load_annotated(root, 'test')


def test_broken_flickr_picture_is_met_once_for_its_captions(tmp_path, monkeypatch):
    root = flickr(tmp_path, 'blip')
    (root / 'flickr30k-images/train0.jpg').write_bytes(b'')
    train, opened = AnnotatedTrain(root, TRANSFORM, 30), []
    monkeypatch.setattr(datasets, 'open_part', lambda path, *how: opened.append(path) or open_part(path, *how))
    item = train[0]
    assert item['caption'] == 'two cats' and len(item['bad']) == 1
    assert [Path(path).name for path in opened] == ['train0.jpg', 'train1.jpg']


def test_held_out_pictures(tmp_path):
    dataset = ImageTextEval(flickr(tmp_path, 'blip'), 'test', eval_transform(16), 2)
    assert len(dataset) == 3 and dataset[1].shape == (3, 16, 16)
    assert dataset.texts == ['x one', 'x two', 'y one', 'z', 'z z', 'z z']
    assert dataset.text_to_image == [0, 0, 1, 2, 2, 2]
    assert dataset.image_to_texts == [[0, 1], [2], [3, 4, 5]]
    assert dataset.references == CAPTIONS['test'] and dataset.paths[2].name == 'test2.jpg'
    dataset.paths[0].unlink()
    with pytest.raises(FileNotFoundError, match='1 of the 3 images of split test are missing.*test0.jpg'):
        ImageTextEval(tmp_path, 'test', eval_transform(16), 2)


def test_errors_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder .*absent: data.root is one of images'):
        load_annotated(tmp_path / 'absent', 'train')
    with pytest.raises(FileNotFoundError, match='looked for dataset_.flickr8k,flickr30k,coco..json, .*results.csv'):
        load_annotated(tmp_path, 'val')
    with pytest.raises(ValueError, match="unknown split 'dev': one of train, val, test"):
        load_annotated(tmp_path, 'dev')
    root = flickr(tmp_path, 'kaggle')
    with pytest.raises(ValueError, match="data.split: 'random' is neither standard nor hash"):
        load_annotated(root, 'train', 'random')
    for content, message in (('', 'line 1: not JSON'), ('{"images":\n\n[}', 'line 3: not JSON'), ('[]', 'entry 1'),
                             ('{"images": [{"split": "train"}]}', "entry 1: no 'filename'.*ownload it again"),
                             ('{"images": []}', 'download it again')):
        (root / 'dataset_flickr30k.json').write_text(content)
        with pytest.raises(ValueError, match=f'dataset_flickr30k.json.*{message}'):
            load_annotated(root, 'train')
    (flickr(root, 'karpathy') / 'flickr30k-images').rename(root / 'pictures')
    with pytest.raises(FileNotFoundError, match='looked for train0.jpg in it and in the folders flickr30k-images'):
        load_annotated(root, 'train')
