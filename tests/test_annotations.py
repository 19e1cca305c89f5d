"""Annotated folders: their layouts, the training set and the held-out images."""

import csv
import json
import logging
import os
from collections import Counter
from pathlib import Path

import pytest
from test_datasets import TRANSFORM, write_pictures

from configs import load_config
from data import datasets
from data.annotations import AnnotatedImage, hash_split, load_annotated
from data.datasets import AnnotatedTrain, ImageTextEval
from data.images import open_part
from data.layouts import SPLITS
from data.pairs import open_pairs
from data.transforms import EvalTransform

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
    """Images of one's own, in folders, with two captions each."""
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
    held_out = {name: ImageTextEval(root, name, EvalTransform(16), 30) for name in ('val', 'test')}
    assert [len(train), *map(len, held_out.values())] == ([8, 4, 4] if split else [20, 1, 1])
    name = held_out['val'].paths[0].relative_to(root)
    assert held_out['val'].texts[:2] == [f'{word}, {str(name).replace(".", " ")} 🐕' for word in ('one', 'two')]
    assert train[0]['image'].shape == held_out['test'][0].shape == (3, 16, 16)


def captions_of(root: Path, split: str, how: str = 'standard') -> dict[str, tuple[str, ...]]:
    return {image.path.name: image.captions for image in load_annotated(root, split, how) if image.path.is_file()}


def members(root: Path) -> dict[str, list[str]]:
    return {split: sorted(captions_of(root, split)) for split in SPLITS}


NAMES = [f'{i:02d}_ab.jpg' for i in range(12)]
OFFICIAL = {'train': NAMES[:6], 'val': NAMES[6:9], 'test': NAMES[9:11]}  # one image is in none


def flickr8k(root: Path, layout: str) -> Path:
    texts = {name: [f'A dog, no {i} of "{name}" .' for i in range(2)] for name in NAMES}
    write_pictures(root / ('Flicker8k_Dataset/Flicker8k_Dataset' if layout == 'authors' else 'Images'), NAMES)
    if layout == 'authors':
        (root / 'Flickr8k_text').mkdir()
        lines = [f'{name}#{i}\t{text}' for name in NAMES for i, text in enumerate(texts[name])]
        lines.append('2258277193_586949ec62.jpg.1#0\tIts image is not in the archive .')
        (root / 'Flickr8k_text/Flickr8k.token.txt').write_text('\n'.join(lines) + '\n')
        (root / 'Flickr8k_text/Flickr8k.lemma.token.txt').write_text('x#0\tlemma')
        for split, names in OFFICIAL.items():
            name = f'Flickr_8k.{"dev" if split == "val" else split}Images.txt'
            (root / 'Flickr8k_text' / name).write_text('\r\n'.join([*names, '']))
    elif layout == 'kaggle':
        with open(root / 'captions.txt', 'w', newline='') as file:
            rows = [(name, text) for name in NAMES for text in texts[name]]
            csv.writer(file).writerows([('image', 'caption'), *rows])
    else:
        images = [{'filename': name, 'split': split, 'sentences': [{'raw': text} for text in texts[name]]}
                  for split, names in OFFICIAL.items() for name in names]
        (root / 'dataset_flickr8k.json').write_text(json.dumps({'images': images, 'dataset': 'flickr8k'}))
    return root


@pytest.mark.parametrize('layout', ['authors', 'karpathy'])
def test_flickr8k_with_its_split(tmp_path, layout, caplog):
    root = flickr8k(tmp_path, layout)
    with caplog.at_level(logging.INFO, 'dlip'):
        assert members(root) == OFFICIAL
    assert captions_of(root, 'val')['06_ab.jpg'] == ('A dog, no 0 of "06_ab.jpg" .', 'A dog, no 1 of "06_ab.jpg" .')
    if layout == 'authors':
        assert '2 images are left out, for example 11_ab.jpg: in none of its splits' in caplog.text
        (root / 'Flickr8k_text/Flickr_8k.devImages.txt').unlink()
        with pytest.raises(ValueError, match='needs all of Flickr_8k..train,dev,test.Images.txt'):
            load_annotated(root, 'train')
        for kind in ('train', 'test'):
            (root / f'Flickr8k_text/Flickr_8k.{kind}Images.txt').unlink()
        assert sorted(sum(members(root).values(), [])) == NAMES  # by hash; the image that is not there is left out
        write_pictures(root / 'Flicker8k_Dataset/Flicker8k_Dataset', ['2258277193_586949ec62.jpg'])
        assert len(sum(members(root).values(), [])) == 13


def test_flickr8k_as_kaggle_ships_it(tmp_path, caplog):
    root = flickr8k(tmp_path, 'kaggle')
    with caplog.at_level(logging.INFO, 'dlip'):
        split = members(root)
    assert sorted(sum(split.values(), [])) == NAMES and [len(split[name]) for name in SPLITS] == [10, 1, 1]
    said = 'captions.txt has no split: its images are split by the hash of their names (10 train, 1 val, 1 test)'
    assert caplog.text.count(said) == 1
    assert len(open_pairs(str(root), TRANSFORM, 30, 0)) == 20  # as data.train of pre-training


def coco(root: Path, *splits: str, year: int = 2017, inside: str = 'annotations') -> Path:
    (root / inside).mkdir(exist_ok=True, parents=True)
    for split in splits:
        names = [f'{split}{i:09d}.jpg' for i in range(6)]
        write_pictures(root / f'{split}{year}', names)
        content = {'images': [{'id': 100 + i, 'file_name': name} for i, name in enumerate(names)],
                   'annotations': [{'id': i, 'image_id': 100 + i % 5, 'caption': f'{split} {i}'} for i in range(10)]}
        (root / inside / f'captions_{split}{year}.json').write_text(json.dumps(content))
    return root


@pytest.mark.parametrize('year, inside', [(2017, 'annotations'), (2014, '.')])
def test_cocos_own_captions(tmp_path, caplog, year, inside):
    root = coco(tmp_path, 'train', 'val', year=year, inside=inside)
    with caplog.at_level(logging.INFO, 'dlip'):
        found = {split: load_annotated(root, split) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [6, 3, 3] and 'half of val serves as test' in caplog.text
    assert found['train'][2] == AnnotatedImage(root / f'train{year}/train000000002.jpg', ('train 2', 'train 7'))
    assert {image.path.parent.name for split in ('val', 'test') for image in found[split]} == {f'val{year}'}
    train = AnnotatedTrain(root, TRANSFORM, 30)  # the sixth image has no caption
    assert len(train) == 10 and len({train.pair(i)[2] for i in range(10)}) == 5


def test_coco_with_one_of_its_files(tmp_path):
    assert [len(load_annotated(coco(tmp_path / 'a', 'train'), split)) for split in SPLITS] == [4, 1, 1]
    root = coco(tmp_path / 'b', 'val')
    assert [len(load_annotated(root, split)) for split in ('val', 'test')] == [3, 3]
    with pytest.raises(ValueError, match="captions_val2017.json lists no images of split 'train'"):
        load_annotated(root, 'train')
    path = root / 'annotations/captions_val2017.json'
    path.write_text(path.read_text().replace('"image_id": 103', '"image_id": 7'))
    with pytest.raises(ValueError, match=r'captions_val2017.json: annotations\[3\] is of image 7, which is not among'):
        load_annotated(root, 'val')


@pytest.mark.parametrize('kind', ['csv', 'jsonl'])
@pytest.mark.parametrize('folders', [('train', 'validation', 'test'), ('train', 'test'), ('',), None])
def test_hugging_faces_imagefolder(tmp_path, kind, folders):
    """A table in each split's folder, in one folder, or one table over folders of the splits."""
    names = [f'{i}.png' for i in range(40)]
    for folder in folders or ('train', 'dev'):
        write_pictures(tmp_path / folder / 'deep', names)
        rows = [{'file_name': f'{"" if folders else folder + "/"}deep/{name}', 'text': f'{folder} {name}'}
                for name in names]
        place = tmp_path / (folder if folders else '') / f'metadata.{kind}'
        old = place.read_text() if place.exists() else ''
        if kind == 'csv':
            place.write_text((old or 'file_name,text\n') + ''.join(f'{r["file_name"]},{r["text"]}\n' for r in rows))
        else:
            place.write_text(old + ''.join(json.dumps(row) + '\n' for row in rows))
    found = {split: load_annotated(tmp_path, split) for split in SPLITS}
    assert all(image.path.is_file() for split in SPLITS for image in found[split])
    expected = {('train', 'validation', 'test'): [40, 40, 40], ('train', 'test'): [39, 1, 40], ('',): [38, 1, 1]}
    assert [len(found[split]) for split in SPLITS] == expected.get(folders, [40, 20, 20])


def test_images_with_a_text_beside_each(tmp_path, caplog):
    write_pictures(tmp_path / '10_dogs', [f'{i}.jpg' for i in range(8)])
    write_pictures(tmp_path / '@eaDir', ['x.jpg'])
    for i in range(6):
        (tmp_path / f'10_dogs/{i}.txt').write_text(f'dog {i}, running\n\nanother of {i}\n', encoding='utf-8-sig')
    (tmp_path / '10_dogs/6.txt').write_bytes(b'caf\xe9')
    with caplog.at_level(logging.INFO, 'dlip'):
        found = {name: texts for split in SPLITS for name, texts in captions_of(tmp_path, split).items()}
    assert len(found) == 6 and found['3.jpg'] == ('dog 3, running', '', 'another of 3')
    assert '1 images have no text file, and 1 text files cannot be read: ' in caplog.text
    assert '6.txt, line 1: ' in caplog.text
    (tmp_path / '00000_stats.json').touch()
    with pytest.raises(ValueError, match='holds what img2dataset wrote: make an all.json of it with json_dataset.py'):
        load_annotated(tmp_path, 'train')


@pytest.mark.parametrize('header, row', [
    ('image,caption', '{0},"{1}"'), ('Image ; CAPTION', '{0};{1}'), ('split\ttext\tfile_name', '\t{1}\t{0}'),
    ('a|caption_0|caption_1|image', '|{1}||{0}'), ('\ufeffimage_name,comment', ' {0} ,"{1}"')])
@pytest.mark.parametrize('encoding, newline', [('utf-8', '\r\n'), ('utf-16', '\n'), ('utf-8-sig', '\n\n')])
@pytest.mark.parametrize('name', ['results.csv', 'mine.tsv'])
def test_tables_as_spreadsheets_save_them(tmp_path, header, row, encoding, newline, name):
    write_pictures(tmp_path, NAMES)
    text = newline.join([header, *(row.format(image, f'Ein Hund, größer, {i}') for i, image in enumerate(NAMES)), ''])
    (tmp_path / name).write_bytes(text.removeprefix('\ufeff' if encoding != 'utf-8' else '').encode(encoding))
    found = {name: texts for split in SPLITS for name, texts in captions_of(tmp_path, split).items()}
    assert sorted(found) == NAMES and found[NAMES[7]][0] == 'Ein Hund, größer, 7'


def test_kaggles_table_in_utf_16(tmp_path):
    write_pictures(tmp_path, NAMES)
    lines = ['image_name| comment_number| comment', *(f'{name}| 0| a | b' for name in NAMES)]
    (tmp_path / 'results.csv').write_text('\n'.join(lines), encoding='utf-16')
    assert {text for texts in captions_of(tmp_path, 'train').values() for text in texts} == {'a | b'}


@pytest.mark.parametrize('header, row', [
    ('image_name,comment_number,comment', '{},0,"a dog, running"'), ('image, caption', '{}, "a dog, running"')])
def test_a_table_of_ones_own_beside_what_spreadsheets_leave(tmp_path, header, row):
    write_pictures(tmp_path, NAMES)
    (tmp_path / 'results.csv').write_text('\n'.join([header, *map(row.format, NAMES), '']))
    (tmp_path / '~$results.csv').write_bytes(b'\0')  # Excel's, while it has the table open
    (tmp_path / 'old.csv').mkdir()
    assert {text for texts in captions_of(tmp_path, 'train').values() for text in texts} == {'a dog, running'}


@pytest.mark.parametrize('text, message', [
    ('image,caption\na.jpg,a cat\nb.jpg,a dog, running\n', 'line 3: 3 fields, but the header has 2: text with a'),
    ('image,caption,split\na.jpg,a cat\n', 'line 2: 2 fields, but the header has 3'),
    ('image,caption\n\na.jpg,"a\ncat"\nb.jpg,"a dog\nc.jpg,a bird\n', 'line 5: .*quotation marks in pairs'),
    ('image,words\n', "line 1: the header has no column caption; found 'image', 'words'"),
    ('a.jpg,a cat\n', "line 1: the header has no column image and no column caption; found 'a.jpg', 'a cat'"),
    ('image,caption,Caption\n', "line 1: the column 'caption' is there twice"),
    ('', 'line 1: the header has no column image and no column caption; found nothing'),
    ('image,caption\na.jpg,a\0cat\n', 'line 2: a NUL byte'),
    ('image,caption\n,a cat\n', 'line 2: no image is named'),
    ('image,caption,split\na.jpg,a cat,train\nb.jpg,a dog,\n', 'line 3: b.jpg has no split, which others have'),
    ('image,caption,split\na.jpg,a cat,held\n', "line 2: split 'held' of a.jpg is none of train, val, test"),
    ('image,caption,split\na.jpg,a cat,train\na.jpg,a dog,test\n',
     'line 3: a.jpg is in split test, and before in split train'),
    (b'image,caption\na.jpg,caf\xe9\n', "line 2: .* is not UTF-8; in Windows-1252 it would be .*café"),
    ('image,caption\na.jpg,a cat\n'.encode('utf-16-le'), 'line 1: a NUL byte: .*UTF-16 without a byte-order mark'),
    ('image,caption\na.jpg,é\n'.encode('utf-16-le'), 'line 1: a NUL byte: .*UTF-16 without a byte-order mark')])
def test_mistakes_in_a_csv_file_name_the_line(tmp_path, text, message):
    (tmp_path / 'mine.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f'mine.csv.*{message}') as error:
        load_annotated(tmp_path, 'test')
    assert len(str(error.value).replace(str(tmp_path), '').splitlines()) == 1


@pytest.mark.parametrize('line, message', [
    ('{"image": "a.jpg"}', "line 2: no caption; found 'image'"),
    ('{"image": 3, "caption": "a"}', 'line 2: 3 is no text'),
    ('{"image": "a.jpg", "Image": "b.jpg", "caption": "a"}', "line 2: the column 'image' is there twice"),
    ('{"image": "a.jpg", "caption": "a", "caption": "b"}', "line 2: the column 'caption' is there twice"),
    ('{"image": "a.jpg", "caption": ["a", 5]}', 'line 2: 5 is no text'),
    ('["a.jpg", "a"]', 'line 2: not a JSON object'),
    ('{"image": "a.jpg",', 'line 2: not JSON .*at column'), ('[' * 100_000, 'line 2: not readable as JSON')])
def test_mistakes_in_json_lines_name_the_line(tmp_path, line, message):
    (tmp_path / 'mine.jsonl').write_text('{"image": "b.jpg", "caption": null}\n' + line + '\n')
    with pytest.raises(ValueError, match=f'mine.jsonl, {message}') as error:
        load_annotated(tmp_path, 'test')
    assert len(str(error.value)) < 400


def test_several_annotations(tmp_path):
    root = own(tmp_path, 'csv', True)
    (root / '._captions.csv').touch()  # macOS's
    assert load_annotated(root, 'test')
    (root / 'more.jsonl').touch()
    with pytest.raises(ValueError, match='holds 2 annotations .captions.csv, more.jsonl.: leave the one with'):
        load_annotated(root, 'test')


def test_names_that_no_file_can_have(tmp_path):
    write_pictures(tmp_path, NAMES)
    rows = [f'{name},a dog,train' for name in [*NAMES, 'x' * 300 + '.jpg', 'a/' * 3000 + 'b.jpg']]
    (tmp_path / 'mine.csv').write_text('\n'.join(['image,caption,split', *rows, 'v.jpg,x,val', 't.jpg,x,test']))
    train = AnnotatedTrain(tmp_path, TRANSFORM, 30)
    bad = train[12]['bad']
    assert len(train) == 14 and len(bad) == 2 and train[13]['caption'] == 'a dog'


def test_folders_whose_name_is_not_utf8(tmp_path):
    root = tmp_path / os.fsdecode(b'caf\xe9')
    root.mkdir()
    train = AnnotatedTrain(flickr8k(root, 'kaggle'), TRANSFORM, 30)
    assert train[0]['bad'] == [] and len(ImageTextEval(root, 'test', EvalTransform(16), 30)) == 1


def test_broken_flickr_picture_is_met_once_for_its_captions(tmp_path, monkeypatch):
    root = flickr(tmp_path, 'blip')
    (root / 'flickr30k-images/train0.jpg').write_bytes(b'')
    train, opened = AnnotatedTrain(root, TRANSFORM, 30), []
    monkeypatch.setattr(datasets, 'open_part', lambda path, *how: opened.append(path) or open_part(path, *how))
    item = train[0]
    assert item['caption'] == 'two cats' and len(item['bad']) == 1
    assert [Path(path).name for path in opened] == ['train0.jpg', 'train1.jpg']


def test_held_out_pictures(tmp_path):
    dataset = ImageTextEval(flickr(tmp_path, 'blip'), 'test', EvalTransform(16), 2)
    assert len(dataset) == 3 and dataset[1].shape == (3, 16, 16)
    assert dataset.texts == ['x one', 'x two', 'y one', 'z', 'z z', 'z z']
    assert dataset.text_to_image == [0, 0, 1, 2, 2, 2]
    assert dataset.image_to_texts == [[0, 1], [2], [3, 4, 5]]
    assert dataset.references == CAPTIONS['test'] and dataset.paths[2].name == 'test2.jpg'
    dataset.paths[0].unlink()
    with pytest.raises(FileNotFoundError, match='1 of the 3 images of split test are missing.*test0.jpg'):
        ImageTextEval(tmp_path, 'test', EvalTransform(16), 2)


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
                             ('{"images": []}', 'download it again'),
                             ('{"images": [{"filename": "a", "sentences": [], "split": {}}]}', 'entry 1: no text')):
        (root / 'dataset_flickr30k.json').write_text(content)
        with pytest.raises(ValueError, match=f'dataset_flickr30k.json.*{message}'):
            load_annotated(root, 'train')
    (flickr(root, 'karpathy') / 'flickr30k-images').rename(root / 'pictures')
    with pytest.raises(FileNotFoundError, match='looked for train0.jpg in it and in the folders flickr30k-images'):
        load_annotated(root, 'train')


def test_a_share_of_the_images_is_held_out(tmp_path):
    """By name too, and the images that a smaller share holds out for test are among them."""
    root = flickr(tmp_path, 'kaggle')
    sizes = {split: len(load_annotated(root, split, 0.3)) for split in SPLITS}
    assert sizes == {'train': 2, 'val': 2, 'test': 2}
    names = [f'{i}.jpg' for i in range(1000)]
    few, many = ({name for name, split in hash_split(names, share).items() if split == 'test'} for share in (0.1, 0.2))
    assert (len(few), len(many)) == (100, 200) and few < many
    assert load_config('configs/caption_flickr.yaml', 'configs/caption_flickr.yaml', ['data.split=0.1']
                       )['data']['split'] == 0.1
    with pytest.raises(ValueError, match='data.split must be one of standard, hash, or a number above 0 and at most'):
        load_config('configs/caption_flickr.yaml', 'configs/caption_flickr.yaml', ['data.split=0.9'])
