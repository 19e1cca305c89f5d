"""Pre-training from img2dataset's tars: what an epoch holds, resume, processes and workers, damage, a run."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import run, write_config

import pretrain_dlip
from bench.stress import same
from data import shards
from data.loader import make_loader
from data.shards import ShardDataset, is_shards, list_shards
from data.tars import count_images, read_shard
from data.transforms import TrainTransform
from models.engine.logs import read_log
from models.engine.run_state import RunState
from utils import ROOT

pytestmark = pytest.mark.slow

TRANSFORM = TrainTransform(16, 0.5, True)
SIZES = (13, 5, 8)  # pictures that were downloaded, of each shard


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """A shard as img2dataset's: files KEY.jpg, KEY.json and KEY.txt of one sample after another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for number, sample in enumerate(samples):
            for kind, content in sample.items():
                member = tarfile.TarInfo(f'{path.stem}{number:04d}.{kind}')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def sample(caption: str, grey: int) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.linear_gradient('L').rotate(19 * grey).resize((24, 24)).convert('RGB').save(file, 'JPEG')
    record = {'caption': caption, 'status': 'success'}
    return {'jpg': file.getvalue(), 'json': json.dumps(record).encode(), 'txt': caption.encode(errors='ignore')}


def write_stats(tar: Path, successes: int) -> None:
    tar.with_name(f'{tar.stem}_stats.json').write_text(json.dumps({'count': successes + 2, 'successes': successes}))


@pytest.fixture
def cc3m(tmp_path) -> Path:
    """A folder of three shards; sample i of all has the caption 'Image i, left!'."""
    total = 0
    for shard, size in enumerate(SIZES):
        tar = write_tar(tmp_path / 'cc3m' / f'{shard:05d}.tar',
                        [sample(f'Image {total + i}, left!', total + i) for i in range(size)])
        write_stats(tar, size)
        total += size
    return tmp_path / 'cc3m'


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(shards, 'WINDOW', 4)


def dataset(source, seed: int = 0) -> ShardDataset:
    return ShardDataset(str(source), TRANSFORM, 30, seed)


def epoch(source, batch_size=2, seed=0, epoch=0, start_batch=0, workers=0, rank=0, world_size=1) -> list[dict]:
    return list(make_loader(dataset(source, seed), batch_size, seed=seed, epoch=epoch, start_batch=start_batch,
                            workers=workers, rank=rank, world_size=world_size))


def ids(batches: list[dict]) -> list[int]:
    return [number for batch in batches for number in batch['id'].tolist()]


# ---------------------------------------------------------------- what an epoch holds

def test_an_epoch_holds_every_sample_once(cc3m):
    batches = epoch(cc3m)
    assert len(dataset(cc3m)) == 26 and len(batches) == 13 and sorted(ids(batches)) == list(range(26))
    assert batches[0]['image'].shape == (2, 3, 16, 16) and batches[0]['image'].dtype == torch.uint8
    for batch in batches:
        assert batch['bad'] == []
        for caption, number in zip(batch['caption'], batch['id'].tolist(), strict=True):
            assert caption in (f'image {number}, left', f'image {number}, right')


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('world_size, workers', [(1, 3), (2, 0), (2, 2), (5, 2)])
def test_processes_and_workers_share_an_epoch(cc3m, world_size, workers):
    """More readers than shards included: every process has as many batches, and no sample is seen twice."""
    parts = [epoch(cc3m, rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
    assert {len(part) for part in parts} == {26 // (2 * world_size)}
    seen = ids(sum(parts, []))
    assert len(set(seen)) == len(seen) == 26 // (2 * world_size) * 2 * world_size


def test_order_is_a_function_of_seed_and_epoch(cc3m):
    orders = [ids(epoch(cc3m, seed=seed, epoch=number)) for seed, number in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] == ids(epoch(cc3m)) and len(set(map(tuple, orders))) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(26))}
    neighbours = np.abs(np.diff(orders[0]))
    assert (neighbours == 1).sum() < 15 and neighbours.max() > 15  # within a window, and from shard to shard


def test_a_sample_is_transformed_as_its_seed_epoch_and_number_say(cc3m):
    def pictures(batches):
        return {number: batch['image'][i] for batch in batches for i, number in enumerate(batch['id'].tolist())}
    here, there = pictures(epoch(cc3m)), pictures(epoch(cc3m, world_size=2, rank=1, workers=1))
    assert there and all(torch.equal(here[number], there[number]) for number in there)
    later = pictures(epoch(cc3m, epoch=1))
    assert not any(torch.equal(here[number], later[number]) for number in here)


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('workers, starts', [(0, range(1, 14)), (2, (1, 6, 13)), (3, (4, 12))])
def test_a_resumed_epoch_is_the_rest_of_it(cc3m, workers, starts):
    whole = epoch(cc3m, workers=workers)
    for start in starts:
        assert same(whole[start:], epoch(cc3m, workers=workers, start_batch=start)), start


def test_resume_opens_only_the_shards_that_are_left(cc3m, monkeypatch):
    opened, read = [], shards.read_shard
    monkeypatch.setattr(shards, 'read_shard', lambda url: opened.append(Path(url).name) or read(url))
    epoch(cc3m)
    whole, first = opened[:], opened[0]
    opened.clear()
    epoch(cc3m, start_batch=11)
    assert len(whole) == 3 and first not in opened and opened == whole[-len(opened):]


# ---------------------------------------------------------------- sources

def test_one_setting_names_the_shards(cc3m, tmp_path):
    write_tar(tmp_path / 'sbu/00007.tar', [sample('a', 1)])
    pattern = f'{cc3m}/{{00000..00002}}.tar'
    assert [Path(url).name for url in list_shards(pattern)] == ['00000.tar', '00001.tar', '00002.tar']
    assert list_shards(str(cc3m)) == list_shards(pattern)
    assert list_shards(f'{pattern} :: {tmp_path}/sbu') == [*list_shards(pattern), f'{tmp_path}/sbu/00007.tar']
    assert is_shards(pattern) and is_shards(str(cc3m)) and not is_shards(f'{tmp_path}/all.json')
    settings = re.findall(r'^  train: (.*)$', (ROOT / 'data/README.md').read_text(), re.MULTILINE)
    assert settings and all(map(is_shards, settings))


def test_shards_through_a_command(cc3m):
    """What is not on a disk: webdataset runs the command, for the statistics too."""
    urls = f'pipe:cat {cc3m}/{{00000..00002}}.tar'
    assert same(epoch(urls), epoch(cc3m))
    (cc3m / '00001_stats.json').unlink()
    assert len(dataset(urls)) == 26


def test_pictures_are_counted_without_statistics(cc3m):
    for path, useless in zip(sorted(cc3m.glob('*_stats.json')), ('{"successes": 1e999}', '[' * 10 ** 5, None),
                             strict=True):
        path.unlink() if useless is None else path.write_text(useless)
    assert [count_images(url) for url in list_shards(str(cc3m))] == list(SIZES)
    (cc3m / '00000_stats.json').write_text('{"successes": 1e22}')
    assert count_images(str(cc3m / '00000.tar')) == SIZES[0]
    (cc3m / '00000_stats.json').unlink()
    os.mkfifo(cc3m / '00000_stats.json')
    whole = (cc3m / '00000.tar').read_bytes()
    (cc3m / '00000.tar').write_bytes(whole[:len(whole) // 2])  # a download that was killed
    assert 0 < count_images(str(cc3m / '00000.tar')) < 13
    (cc3m / '00000.tar').write_bytes(b'<html>')
    with pytest.raises(ValueError, match='00000.tar cannot be read as a tar: .*Download it again'):
        dataset(cc3m)


def test_captions_from_the_json_file_where_there_is_no_text(tmp_path):
    """Half an emoji, which a tokenizer could not take, included."""
    write_tar(tmp_path / '0.tar', [{kind: part for kind, part in sample(f'Dog \ud83d{i}', i).items() if kind != 'txt'}
                                   for i in range(4)])
    assert sorted(text for batch in epoch(tmp_path) for text in batch['caption']) == [f'dog {i}' for i in range(4)]


def test_shards_that_are_not_there(cc3m, tmp_path):
    (tmp_path / 'empty').mkdir()
    for source, error, message in ((f'{cc3m}/{{00000..00004}}.tar', FileNotFoundError, '2 of the 5 shards .*00003.tar'),
                                   (tmp_path / 'empty', FileNotFoundError, 'empty holds no .tar: .*webdataset')):
        with pytest.raises(error, match=message):
            dataset(source)
    with pytest.raises(ValueError, match='more than 1,000,000 shards: mend its braces'):
        dataset(f'{cc3m}/{{0..9}}{{0..99999999999}}.tar')
    write_stats(write_tar(tmp_path / 'failed/0.tar', []), 0)
    with pytest.raises(ValueError, match='holds no image: its downloads failed'):
        dataset(tmp_path / 'failed')
    with pytest.raises(ValueError, match='26 training samples are less than one batch of 27'):
        epoch(cc3m, batch_size=27)


# ---------------------------------------------------------------- tars as others write them

def add(tar: tarfile.TarFile, name: str, content: bytes = b'', **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def found(path: Path) -> dict[str, str]:
    """Caption by the image's name in the tar; counting agrees with reading."""
    samples = [(image.name.removeprefix(f'{path}/'), caption) for image, caption in read_shard(str(path))]
    assert count_images(str(path)) == len(samples)
    return dict(samples)


JPG = sample('', 1)['jpg']


@pytest.mark.parametrize('name, mode', [('a.tar', 'w'), ('a.tar.gz', 'w:gz'), ('A.TGZ', 'w:gz'), ('b.tar.xz', 'w:xz')])
@pytest.mark.parametrize('kind', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_and_members_of_every_kind(tmp_path, name, mode, kind):
    """The key ends at the first dot of the file name, folders included; what is no file, or hidden, is passed over."""
    long = 'folder.with.dots/' + 'x' * 200
    with tarfile.open(tmp_path / name, mode, format=kind) as tar:
        add(tar, 'folder', type=tarfile.DIRTYPE)
        for i, key in enumerate(('./one', 'two', 'folder.with.dots/three', long, 'fünf')):
            add(tar, f'{"/".join(["", *key.split("/")[:-1]])[1:]}/._{key.split("/")[-1]}.jpg'.lstrip('/'), b'macOS')
            add(tar, f'{key}.JPG' if i % 2 else f'{key}.jpg', JPG)
            add(tar, f'{key}.txt', f'a {i}'.encode())
        add(tar, 'link.jpg', type=tarfile.SYMTYPE, linkname='two.jpg')
        add(tar, 'hard.jpg', type=tarfile.LNKTYPE, linkname='two.JPG')
        add(tar, 'IMG.0001.jpg', JPG)
        add(tar, 'IMG.0001.json', b'{"caption": "dotted"}')
        add(tar, 'no_dot', b'x')
    assert list_shards(str(tmp_path)) == [str(tmp_path / name)]
    assert found(tmp_path / name) == {
        './one.jpg': 'a 0', 'two.jpg': 'a 1', 'folder.with.dots/three.jpg': 'a 2', f'{long}.jpg': 'a 3',
        'fünf.jpg': 'a 4', 'IMG.0001.jpg': 'dotted'}


def test_several_images_of_a_key_and_repeated_names(tmp_path, caplog):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name in ('a.mask.png', 'a.jpg', 'a.txt', 'a.jpg', 'a.txt', 'b.0.jpg', 'b.1.jpg', 'b.1.txt', 'b.0.txt',
                     'c.txt', 'd.webp', 'd.json', 'e.png', 'e.json'):
            content = {'d.json': b'{"caption": NaN}', 'e.json': b'[' * 99999}.get(name, JPG)
            add(tar, name, name[0].encode() if name in ('a.txt', 'b.0.txt') else content)
    assert found(tmp_path / 'a.tar') == {'a.jpg': 'a', 'b.0.jpg': 'b', 'd.webp': '', 'e.png': ''}
    assert 'a.tar: 3 images are left out: their names are those of others up to the first dot' in caplog.text


@pytest.mark.parametrize('number', [0, 2])
def test_a_broken_header_costs_one_sample(tmp_path, number):
    path = write_tar(tmp_path / '0.tar', [sample(f'image {i}', i) for i in range(6)])
    with tarfile.open(path) as tar:
        place = tar.getmember(f'0000{number}.jpg').offset
    content = bytearray(path.read_bytes())
    content[place:place + 100] = b'\xff' * 100
    path.write_bytes(content + content)  # and joined tars are read to the end
    assert sorted(found(path).values()) == [f'image {i}' for i in range(6) if i != number]


def test_what_is_no_tar(cc3m, tmp_path):
    (tmp_path / 'my.target').mkdir()
    shutil.copy(cc3m / '00000.tar', tmp_path / 'my.target/._0.tar')
    for source in ('my.target/all.json', 'my.target', 'a.tar.json', 'all.json'):
        assert not is_shards(str(tmp_path / source)), source
    for source in ('a.tar', '{0..3}.TGZ', 'a.tar.gz', 'a.tar::b', 'pipe:zcat x', 's3://b/x'):
        assert is_shards(source), source
    tarfile.open(tmp_path / 'empty.tar', 'w').close()
    assert count_images(str(tmp_path / 'empty.tar')) == 0 and found(tmp_path / 'empty.tar') == {}
    with pytest.raises(ValueError, match='WDS_NOWHERE'):
        list_shards('${NOWHERE}/0.tar')


@pytest.mark.parametrize('command, message', [
    ('cat {}/absent.tar', r'the command failed .exit code 1. cat: .*absent.tar: No such file'),
    ('no-such-command {}/00001.tar', r'the command failed .exit code 127. .*no-such-command'), ('true', 'empty file')])
def test_a_command_that_fails(cc3m, capfd, command, message):
    (cc3m / '00001_stats.json').unlink()
    with pytest.raises(ValueError, match=f'pipe:.* cannot be read as a tar: {message}'):
        dataset(f'pipe:{command.format(cc3m)}')
    assert 'Traceback' not in capfd.readouterr().err


def test_a_command_that_ends_early(cc3m, capfd):
    (cc3m / '00002_stats.json').unlink()
    assert 0 < count_images(f'pipe:head -c 9000 {cc3m}/00002.tar') < 8
    data = dataset(f'pipe:cat {cc3m}/00000.tar::{cc3m}/00001.tar')
    data.urls[0] = f'pipe:head -c 9000 {cc3m}/00000.tar; exit 3'  # fails later than it was counted
    batches = list(make_loader(data, 2, seed=0, epoch=0, start_batch=0, workers=0, rank=0, world_size=1))
    lost = [message for batch in batches for _, _, message in batch['bad']]
    assert len(batches) == 9 and lost and all('are lost: the command failed (exit code 3)' in text for text in lost)
    assert 'Traceback' not in capfd.readouterr().err


# ---------------------------------------------------------------- damage

def test_broken_and_captionless_samples_are_replaced_and_the_former_counted(tmp_path):
    samples = [sample(f'Image {i}', i) for i in range(12)]
    samples[3]['jpg'], samples[7]['jpg'] = b'', samples[7]['jpg'][:-100]
    samples[5] = {'jpg': samples[5]['jpg'], 'txt': b' ...'}
    samples[6] = {'txt': b'no image'}  # not one of img2dataset's samples at all
    write_tar(tmp_path / '00000.tar', samples)
    batches = epoch(tmp_path, batch_size=1)
    assert len(batches) == 11 and set(ids(batches)) == {0, 1, 2, 4, 7, 8, 9, 10}  # numbered are those with a picture
    bad = {(Path(path).name, kind) for batch in batches for path, kind, _ in batch['bad']}
    assert bad == {('000000003.jpg', 'not an image'), ('000000007.jpg', 'damaged')}
    assert same(batches[5:], epoch(tmp_path, batch_size=1, start_batch=5))


def test_a_shard_that_breaks_off_is_filled_from_others(cc3m):
    whole = (cc3m / '00000.tar').read_bytes()
    (cc3m / '00000.tar').write_bytes(whole[:len(whole) // 2])
    batches = epoch(cc3m)
    lost = [entry for batch in batches for entry in batch['bad']]
    there = 13 - len(lost)
    assert len(batches) == 13 and 0 < there < 13 and set(ids(batches)) == {*range(there), *range(13, 26)}
    assert {entry[:2] for entry in lost} == {(f'{cc3m}/00000.tar', 'damaged')}
    assert f'{len(lost)} samples of {cc3m}/00000.tar are lost: ' in lost[0][2]
    assert same(batches[6:], epoch(cc3m, start_batch=6))
    for tar in cc3m.glob('*.tar'):
        tar.unlink()
        tar.touch()
    with pytest.raises(ValueError, match='none of the 3 shards can be read: 1?[358] samples of'):
        next(dataset(cc3m).rows([0, 1, 2], 0, 1))


# ---------------------------------------------------------------- a run

def as_shards(scenes: Path, folder: Path) -> Path:
    """The scene set's downloads in the other of img2dataset's layouts."""
    for number, source in enumerate(('cc3m', 'mscoco', 'sbu')):
        keys = sorted(path.stem for path in (scenes / source / '00000').glob('*.jpg'))
        tar = write_tar(folder / f'{number:05d}.tar', [
            {kind: (scenes / source / '00000' / f'{key}.{kind}').read_bytes() for kind in ('jpg', 'json', 'txt')}
            for key in keys])
        for kind in ('.parquet', '_stats.json'):
            shutil.copy(scenes / source / f'00000{kind}', tar.with_name(f'{tar.stem}{kind}'))
    return folder


def test_a_run_from_shards_resumes_bit_exactly(scenes, tmp_path, monkeypatch):
    source = as_shards(scenes, tmp_path / 'shards')
    config = write_config(tmp_path, 'pretrain', scenes, data__train=f'{source}/{{00000..00002}}.tar',
                          data__num_workers=2, train__epochs=1)
    want = run(pretrain_dlip, config, tmp_path / 'whole')
    assert want['steps_per_epoch'] == len(dataset(source)) // 8 and (tmp_path / 'whole/samples.png').exists()
    assert read_log(tmp_path / 'whole/log.txt')[0]['train_loss'] > 0
    saves, save = [], RunState.save

    def killed(self):
        save(self)
        saves.append(self.batch)
        if len(saves) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(RunState, 'save', killed)
    with pytest.raises(KeyboardInterrupt):
        run(pretrain_dlip, config, tmp_path / 'broken')
    monkeypatch.undo()
    monkeypatch.setattr(shards, 'WINDOW', 4)
    got = run(pretrain_dlip, config, tmp_path / 'broken')
    assert saves == [2, 4] and same(got['model'], want['model'])
