"""Datasets, the index of all.json, and loaders."""

import json
import logging
import os
import pickle
import random
import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import index
from data.captions import clean_caption, is_empty, storable
from data.datasets import PairDataset
from data.json_list import read_json_list
from data.loader import BadImages, make_loader
from data.transforms import TrainTransform

TRANSFORM = TrainTransform(16, 0.5, True)


def write_pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.linear_gradient('L').rotate(19 * i).resize((24, 24)).convert('RGB').save(folder / name)


@pytest.fixture
def all_json(tmp_path) -> Path:
    """Twenty pairs with relative and absolute paths."""
    names = [f'{i}.png' for i in range(20)]
    write_pictures(tmp_path / 'images', names)
    path = tmp_path / 'all.json'
    path.write_text(json.dumps([{'caption': f'Image {i}, left!', 'id': i, 'image_root': f'images/{name}' if i % 2
                                 else str(tmp_path / 'images' / name)} for i, name in enumerate(names)]))
    return path


def pairs(path: Path, seed: int = 0) -> PairDataset:
    return PairDataset(path, TRANSFORM, 30, seed)


def loader(dataset, batch_size=4, seed=0, epoch=0, start_batch=0, workers=0, rank=0, world_size=1):
    return make_loader(dataset, batch_size, seed=seed, epoch=epoch, start_batch=start_batch, workers=workers, rank=rank,
                       world_size=world_size)


def equal(a: dict, b: dict) -> bool:
    return torch.equal(a['image'], b['image']) and a['caption'] == b['caption'] and a['bad'] == b['bad'] \
        and torch.equal(torch.as_tensor(a['id']), torch.as_tensor(b['id']))


def rewrite(path: Path, change) -> None:
    records = json.loads(path.read_text())
    path.write_text(json.dumps(change(records)))


# ---------------------------------------------------------------- captions

def pre_caption(caption: str, max_words: int) -> str:
    """BLIP's, as published (data/utils.py)."""
    caption = re.sub(r"([.!\"()*#:;~])", ' ', caption.lower())
    caption = re.sub(r"\s{2,}", ' ', caption)
    caption = caption.rstrip('\n')
    caption = caption.strip(' ')
    caption_words = caption.split(' ')
    if len(caption_words) > max_words:
        caption = ' '.join(caption_words[:max_words])
    return caption


anything = st.text(st.characters(exclude_categories=()) | st.sampled_from(' \t\n.!"()*#:;~\ud83d\u200d\u3000'))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(anything | st.lists(anything, max_size=40).map(' '.join), st.integers(1, 40))
@example('Two (2) "big"  dogs; #1!\n', 30)
@example('a\tb', 1)
@example("L'ÉTÉ à la plage: 5€ 👩‍👩‍👧 🐕!", 30)
def test_clean_caption_is_blips_on_any_string(text, max_words):
    cleaned = clean_caption(text, max_words)
    assert cleaned == pre_caption(text, max_words)
    assert is_empty(text) == (not pre_caption(text, 10 ** 6).split())
    held = storable(text)
    assert held == ''.join(c for c in text if not '\ud800' <= c <= '\udfff')
    assert pa.array([held]).to_pylist() == [json.loads(json.dumps(held).encode())] == [held]


def test_unicode_survives():
    assert clean_caption('Straße mit 👩‍👩‍👧 und 🐕 (東京)!', 30) == 'straße mit 👩‍👩‍👧 und 🐕 東京'


# ---------------------------------------------------------------- all.json

def test_pairs_are_those_of_all_json(all_json):
    dataset = pairs(all_json)
    assert len(dataset) == 20
    for i in (0, 1, 19):
        path, caption, number = dataset.pair(i)
        assert (Path(path), caption) == (all_json.parent / f'images/{i}.png', f'Image {i}, left!')
    item = dataset[3]
    assert item['image'].shape == (3, 16, 16) and item['image'].dtype == torch.uint8
    assert item['caption'] in ('image 3, left', 'image 3, right') and item['bad'] == []


def test_empty_captions_are_left_out_and_long_ones_cut(all_json, caplog):
    def change(records):
        records[0]['caption'], records[1]['caption'], records[2]['caption'] = '', ' ...!\n', 'word ' * 5000
        return records
    rewrite(all_json, change)
    with caplog.at_level(logging.INFO, 'dlip'):
        dataset = pairs(all_json)
    assert '2 pairs without a caption are left out' in caplog.text
    assert len(dataset) == 18 and dataset[0]['caption'] == ' '.join(['word'] * 30)


def test_index_is_built_once_and_again_when_all_json_changed(all_json):
    built = pairs(all_json).index
    assert built == all_json.with_name('all.json.arrow')
    before = built.stat().st_mtime_ns
    assert pairs(all_json).index.stat().st_mtime_ns == before
    rewrite(all_json, lambda records: records[:7])
    assert len(pairs(all_json)) == 7
    built.write_bytes(b'torn')
    assert len(pairs(all_json)) == 7
    assert sorted(os.listdir(all_json.parent)) == ['all.json', 'all.json.arrow', 'images']


def test_index_of_a_read_only_folder_is_in_the_temporary_one(all_json, tmp_path, monkeypatch):
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    monkeypatch.setattr(index.tempfile, 'gettempdir', lambda: str(elsewhere))
    monkeypatch.setattr(index.os, 'access', lambda path, mode: False)
    dataset = pairs(all_json)
    assert dataset.index.parent == elsewhere and 'image 1' in dataset[1]['caption']
    assert not all_json.with_name('all.json.arrow').exists()


def test_failed_build_leaves_the_good_index(all_json, monkeypatch):
    good = pairs(all_json).index.read_bytes()
    rewrite(all_json, lambda records: records[:7])

    def full(*args):
        raise OSError('No space left on device')
    monkeypatch.setattr(pa.ipc, 'new_file', full)
    with pytest.raises(OSError):
        pairs(all_json)
    assert all_json.with_name('all.json.arrow').read_bytes() == good and len(os.listdir(all_json.parent)) == 3


@pytest.mark.parametrize('content, line', [
    ('', 1), ('{"caption": 1}', 1), ('null', 1), ('\n[{"cap', 2), ('[1]', 1), ('[\n\n{"caption": "a", "id": 1}]', 3),
    ('[{"caption": "a", "image_root": "a"},\n{"caption": 7, "image_root": "a"}]', 2),
    ('[{"caption": "a", "image_root": "a"},\n\n{"caption": "a", "image_root": 7}]', 3),
    ('[\n{"caption": "a", "image_root": "a"}\n{"caption": "a"}]', 2)])
def test_all_json_that_is_none(all_json, content, line):
    all_json.write_text(content)
    with pytest.raises(ValueError, match=rf'all.json.* line {line}: .*Write all.json with json_dataset.py'):
        pairs(all_json)
    assert not all_json.with_name('all.json.arrow').exists()
    all_json.write_bytes(b'[\n{"caption": "caf\xe9"}]')
    with pytest.raises(ValueError, match='all.json, line 2: .* is not UTF-8; in Windows-1252 it would be .*café'):
        pairs(all_json)


def test_pairs_of_one_path_share_an_id(all_json):
    """Whatever ids they are written with; and pairs that cannot be trained on are left out and counted."""
    rewrite(all_json, lambda records: [records[4], *records, {**records[4], 'id': 'x'}, {**records[5], 'caption': None},
                                       {**records[6], 'image_root': None}, {'caption': 'b', 'image_root': '\ud83d'}])
    dataset = pairs(all_json)
    numbers = [dataset.pair(i)[2] for i in range(len(dataset))]
    assert len(numbers) == 22 and len(set(numbers)) == 20 and numbers[0] == numbers[5] == numbers[-1]
    assert all(0 <= number < 2 ** 63 for number in numbers) and dataset[0]['id'] == numbers[0]


def test_an_index_of_an_older_version_is_built_again(all_json, monkeypatch):
    monkeypatch.setattr(index, 'VERSION', 1)
    before = pairs(all_json).index.read_bytes()
    monkeypatch.undo()
    assert pairs(all_json).index.read_bytes() != before


def test_paths_that_are_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b'caf\xe9')
    write_pictures(folder, ['a.png'])
    path = tmp_path / 'all.json'
    path.write_text(json.dumps([{'caption': 'one', 'image_root': str(folder / 'a.png')}]))
    assert pairs(path).pair(0)[0] == str(folder / 'a.png') and pairs(path)[0]['bad'] == []


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(values, max_size=5), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 30), st.floats(0, 1))
def test_json_lists_are_read_in_pieces(tmp_path_factory, items, indent, ascii_only, chunk, cut):
    path, text = tmp_path_factory.getbasetemp() / 'list.json', json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding='utf-8')
    assert [item for _, item in read_json_list(path, chunk)] == items
    for broken in (text[:int(cut * len(text))], text + ']', text + '1', ',' + text):
        if broken != text:
            path.write_text(broken, encoding='utf-8')
            with pytest.raises(ValueError, match='list.json breaks off after'):
                list(read_json_list(path, chunk))


def test_index_is_read_without_a_copy(all_json):
    built = pairs(all_json).index
    before = pa.total_allocated_bytes()
    table = index.read_index(built)
    assert table.nbytes > 500 and pa.total_allocated_bytes() == before


def test_index_of_many_batches(all_json, monkeypatch):
    monkeypatch.setattr(index, 'BATCH', 3)
    dataset = pairs(all_json)
    assert dataset.table['id'].num_chunks == 7
    assert [dataset.pair(i)[1] for i in range(20)] == [f'Image {i}, left!' for i in range(20)]


def test_half_an_emoji_in_all_json_does_not_stop_it(all_json):
    rewrite(all_json, lambda records: [{**records[0], 'caption': 'a dog \ud83d'}, *records[1:]])
    assert pairs(all_json).pair(0)[1] == 'a dog '


@pytest.mark.parametrize('content', ['[]', '[{"caption": " ", "id": 1, "image_root": "a"}]'])
def test_all_json_without_a_pair(all_json, content):
    all_json.write_text(content)
    with pytest.raises(ValueError, match='holds no pair with a caption: run json_dataset.py again'):
        pairs(all_json)


def test_all_json_or_its_pictures_are_missing(all_json):
    with pytest.raises(FileNotFoundError, match='no .*absent.json: write it with json_dataset.py'):
        pairs(all_json.with_name('absent.json'))
    (all_json.parent / 'images').rename(all_json.parent / 'moved')
    with pytest.raises(FileNotFoundError, match='none of 16 images looked for is there, for example .*0.png'):
        pairs(all_json)


def test_dataset_travels_to_a_worker_without_its_table(all_json):
    dataset = pairs(all_json)
    sent = pickle.dumps(dataset)
    assert b'Image 7' not in sent and equal(pickle.loads(sent)[7], dataset[7])


# ---------------------------------------------------------------- determinism

def test_item_is_a_function_of_seed_epoch_and_index(all_json):
    dataset = pairs(all_json)
    first = dataset[5]
    random.seed(9)
    torch.manual_seed(9)
    states = random.getstate(), torch.get_rng_state()
    assert equal(dataset[5], first)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert not torch.equal(pairs(all_json, seed=1)[5]['image'], first['image'])
    dataset.epoch = 1
    assert not torch.equal(dataset[5]['image'], first['image'])


def test_generators_are_put_back_after_an_error(all_json, monkeypatch):
    dataset = pairs(all_json)
    states = random.getstate(), torch.get_rng_state()
    monkeypatch.setattr(TrainTransform, '__call__', lambda *args: 1 / (random.random() * 0))
    with pytest.raises(ZeroDivisionError):
        dataset[0]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_batches_do_not_depend_on_workers(all_json):
    here = list(loader(pairs(all_json), epoch=3))
    there = list(loader(pairs(all_json), epoch=3, workers=2))
    assert len(here) == 5 and all(map(equal, here, there))
    assert len({i for batch in here for i in batch['id'].tolist()}) == 20


def test_two_processes_see_the_global_batches_of_one(all_json):
    one = list(loader(pairs(all_json), batch_size=6))
    halves = [list(loader(pairs(all_json), batch_size=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert len(one) == 3
    for whole, first, second in zip(one, *halves, strict=True):
        assert torch.equal(whole['image'], torch.cat([first['image'], second['image']]))
        assert whole['caption'] == first['caption'] + second['caption']


def test_resumed_epoch_is_the_rest_of_it(all_json):
    whole, rest = list(loader(pairs(all_json))), loader(pairs(all_json), start_batch=3)
    assert len(rest) == 2 and all(map(equal, whole[3:], rest))
    read = []
    dataset = pairs(all_json)
    dataset.pair = lambda index: read.append(index) or PairDataset.pair(dataset, index)
    next(iter(loader(dataset, start_batch=4)))
    assert len(read) == 4  # what was seen before is not opened again
    assert len(loader(dataset, start_batch=5)) == len(list(loader(dataset, start_batch=5))) == 0


def test_epochs_and_seeds_augment_and_shuffle_differently(all_json):
    dataset = pairs(all_json)
    dataset.epoch = 2
    drawn = dataset[7]['image']
    dataset.epoch = 0
    batches = list(loader(dataset, epoch=2, workers=1))
    assert any(torch.equal(image, drawn) for batch in batches for image in batch['image'])
    orders = [tuple(i for batch in loader(pairs(all_json), epoch=epoch, seed=seed) for i in batch['id'].tolist())
              for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert len(set(orders)) == 3


def test_fewer_samples_than_a_batch(all_json):
    with pytest.raises(ValueError, match='20 training samples are less than one batch of 11 x 2 processes'):
        loader(pairs(all_json), batch_size=11, world_size=2)


# ---------------------------------------------------------------- broken pictures

def test_broken_picture_is_replaced_by_the_next(all_json):
    (all_json.parent / 'images/4.png').write_bytes(b'no image')
    (all_json.parent / 'images/5.png').unlink()
    item = pairs(all_json)[4]
    assert item['caption'].startswith('image 6')
    assert [(Path(path).name, kind) for path, kind, _ in item['bad']] == [('4.png', 'not an image'),
                                                                          ('5.png', 'missing')]
    assert all(path in message for path, _, message in item['bad'])
    bad = [pair for batch in loader(pairs(all_json), workers=1) for pair in batch['bad']]
    assert len(bad) == 3  # item 4 met both, item 5 the second


def test_no_readable_picture_at_all(all_json):
    for path in (all_json.parent / 'images').iterdir():
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='20 images in a row cannot be read; the first: .*3.png'):
        pairs(all_json)[3]


def batch(good: int, bad: list[str], kind: str = 'damaged') -> dict:
    return {'caption': ['a'] * good, 'bad': [(path, kind, f'{path} is broken') for path in bad]}


def test_too_many_broken_pictures_stop_the_run(caplog):
    count = BadImages(0.05, logging.getLogger('dlip'))
    count.update(batch(4, ['a.jpg', 'b.jpg', 'a.jpg']))
    assert count.check() == '3 of 7 images (3 damaged)'  # too few to judge
    assert caplog.text.count('broken image skipped (damaged): a.jpg is broken') == 1
    count.update(batch(189, ['a.jpg', 'b.jpg'] * 4, 'missing'))  # met again: as broken as the first time
    with pytest.raises(ValueError, match=r'11 of 204 images \(8 missing, 3 damaged\) cannot be read: 5.4%, more than '
                                         r'data.max_bad_fraction 0.05; the first: a.jpg is'):
        count.check()


def test_some_broken_pictures_are_tolerated_in_every_epoch():
    count = BadImages(0.05, logging.getLogger('dlip'))
    for _ in range(50):
        count.update(batch(96, ['a.jpg', 'b.jpg', 'c.jpg', 'd.jpg']))
    assert count.check() == '200 of 5000 images (200 damaged)'
