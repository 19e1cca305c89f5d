"""Flickr30K: its annotation layouts, the finetuning set and the held-out pictures."""

import json
import logging
from pathlib import Path

import pytest
from test_datasets import TRANSFORM, write_pictures

from data import datasets
from data.datasets import FlickrTrain, ImageTextEval
from data.flickr import load_flickr
from data.transforms import eval_transform, open_part

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
    else:
        (root / 'results.csv').write_text('image_name| comment_number| comment\ntrain0.jpg| 0| A man.\n')
    return root


@pytest.mark.parametrize('layout, folder', [('karpathy', 'flickr30k-images'), ('blip', 'images'),
                                            ('karpathy', 'flickr30k_images/flickr30k_images')])
def test_flickr_layouts(tmp_path, layout, folder, caplog):
    root = flickr(tmp_path, layout, folder)
    assert [list(p.captions) for p in load_flickr(root, 'test')] == CAPTIONS['test']
    assert [p.path for p in load_flickr(root, 'val')] == [root / folder / 'val0.jpg']
    with caplog.at_level(logging.INFO, 'dlip'):
        train = FlickrTrain(root, TRANSFORM, 30)
    assert '1 empty captions and 0 pictures without one' in caplog.text
    assert [(item['caption'], item['id']) for item in map(train.__getitem__, range(len(train)))] == \
        [('a man', 0), ('a red dog', 0), ('two cats', 1)]


def test_broken_flickr_picture_is_met_once_for_its_captions(tmp_path, monkeypatch):
    root = flickr(tmp_path, 'blip')
    (root / 'flickr30k-images/train0.jpg').write_bytes(b'')
    train, opened = FlickrTrain(root, TRANSFORM, 30), []
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
    with pytest.raises(FileNotFoundError, match='1 of the 3 pictures of split test are missing.*test0.jpg'):
        ImageTextEval(tmp_path, 'test', eval_transform(16), 2)


def test_flickr_errors_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match='no Flickr30K folder .*absent: set data.root'):
        load_flickr(tmp_path / 'absent', 'train')
    with pytest.raises(FileNotFoundError, match='looked for dataset_flickr30k.json and flickr30k_val.json'):
        load_flickr(tmp_path, 'val')
    with pytest.raises(ValueError, match="unknown split 'dev': one of train, val, test"):
        load_flickr(tmp_path, 'dev')
    root = flickr(tmp_path, 'kaggle')
    with pytest.raises(ValueError, match='results.csv has captions but no split: put Karpathy'):
        load_flickr(root, 'train')
    for content in ('', '[]', '{"images": [{"split": "train"}]}', '{"images": []}'):
        (root / 'dataset_flickr30k.json').write_text(content)
        with pytest.raises(ValueError, match='dataset_flickr30k.json .*download it again'):
            load_flickr(root, 'train')
    (flickr(root, 'karpathy') / 'flickr30k-images').rename(root / 'pictures')
    with pytest.raises(FileNotFoundError, match='looked for the folders flickr30k-images, flickr30k_images, images'):
        load_flickr(root, 'train')
