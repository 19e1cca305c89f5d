"""prod/shards.py: what it writes of a shard, damage, stops and restarts; on this machine and on a cluster."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import watched
from processes import Python
from test_shards import sample, write_tar

from bench.shards import found, run, write_scenes
from data.captions import clean_caption
from data.shards import ShardDataset
from data.tars import read_samples
from data.transforms import TrainTransform
from prod import DLIPProd, capfilt, shards
from prod.capfilt import ShardWorker
from utils import ROOT

pytestmark = pytest.mark.slow

WEIGHT = str(ROOT / 'data/demo_teacher.pth')


@pytest.fixture(scope='module')
def scene_tars(tmp_path_factory) -> tuple[Path, set[str]]:
    """Two shards of rendered scenes, and the keys of those with another's caption."""
    folder = tmp_path_factory.mktemp('scene_tars')
    return folder, write_scenes(folder, 2, 30, swapped=0.2, split='test')


@pytest.fixture
def here(monkeypatch):
    """Shards are worked on in this process, without Ray."""
    def reports(left, options, device):
        options.served['device'] = 'cpu'
        worker = ShardWorker(options)
        for name, url in left.items():
            yield json.loads(worker({'name': [name], 'url': [os.fsencode(url)]})['report'][0])
    threads = torch.get_num_threads()
    monkeypatch.setattr(shards, 'reports', reports)
    yield
    torch.set_num_threads(threads)


def main(source, out: Path, *arguments) -> int:
    return shards.main([str(source), '--out', str(out), '--device', 'cpu', *map(str, arguments)])


def table(out: Path, name: str) -> list[dict]:
    return pq.read_table(out / 'captions' / f'{name}.parquet').to_pylist()


def test_a_shard_gets_captions_scores_embeddings_and_a_tar_to_train_on(here, scene_tars, tmp_path):
    tar, swapped = scene_tars[0] / '00000.tar', scene_tars[1]
    assert main(tar, tmp_path, '--caption', WEIGHT, '--retrieval', WEIGHT, '--min_itm', 0.5, '--num_captions', 2,
                '--batch_size', 8) == 0
    dlip, samples, rows = DLIPProd(None, WEIGHT), dict(read_samples(str(tar))), table(tmp_path, '00000')
    images = [parts['jpg'] for parts in samples.values()]
    assert [row['key'] for row in rows] == list(samples)
    assert [row['caption'] for row in rows] == [parts['txt'].decode() for parts in samples.values()]
    assert [row['url'] for row in rows] == [json.loads(parts['json'])['url'] for parts in samples.values()]
    said = [list(zip(row['caption_dlip'], row['log_probability_dlip'], strict=True)) for row in rows[6:9]]
    for row, expected in zip(said, dlip.generate(images[6:9], num_captions=2, scores=True), strict=True):
        assert [text for text, _ in row] == [text for text, _ in expected]
        assert [score for _, score in row] == pytest.approx([score for _, score in expected], abs=1e-4)
    row, image = rows[3], images[3]
    texts = [clean_caption(row['caption'], 99), *row['caption_dlip']]
    for scores, expected in (([row['cosine'], *row['cosine_dlip']], dlip.similarity(image, texts)),
                             ([row['itm'], *row['itm_dlip']], dlip.match(image, texts))):
        assert scores == pytest.approx(expected[0].tolist(), abs=1e-4)
    img_emb, text_emb = (np.load(tmp_path / kind / f'{kind}_00000.npy') for kind in ('img_emb', 'text_emb'))
    assert np.abs(img_emb - dlip.get_image_feat(images).numpy()).max() < 1e-3
    cosine = (img_emb.astype(np.float32) * text_emb).sum(1)
    assert cosine == pytest.approx([row['cosine'] for row in rows], abs=1e-3)
    metadata = pq.read_table(tmp_path / 'metadata/metadata_00000.parquet').to_pydict()
    assert metadata['image_path'] == list(samples) and metadata['caption'] == [row['caption'] for row in rows]

    dataset = ShardDataset(str(tmp_path / 'filtered'), TrainTransform(16, 0.5, True), 30)
    kept = [(Path(pair.image.name).stem.partition('-')[0], pair.caption) for pair in dataset.rows([0], 0, len(dataset))]
    passing = [(row['key'], text) for row in rows for score, text in
               zip((row['itm'], *row['itm_dlip']), (row['caption'], *row['caption_dlip']), strict=True) if score >= 0.5]
    assert sorted(kept) == sorted(passing) and len(kept) > 60
    assert not {row['key'] for row in rows if (row['key'], row['caption']) in kept} & swapped


def test_the_filter_finds_swapped_captions(here, scene_tars, tmp_path):
    folder, swapped = scene_tars
    rows = run(folder, tmp_path / 'out', WEIGHT)
    precision, recall = found(rows, swapped, 'itm', 0.5)
    assert precision >= 0.9 and recall >= 0.95  # of 12
    assert not (tmp_path / 'out/filtered').exists()


@pytest.mark.parametrize('keep, expected', [
    ('all', {'a', 'a-1'}), ('best', {'a'}), ('web', set())])
def test_what_is_kept_of_the_texts_that_pass(monkeypatch, here, tmp_path, keep, expected):
    """The web's text fails, two new ones pass."""
    tar = write_tar(tmp_path / 'in/0.tar', [sample('a red star', 1)])
    options = ['--retrieval', WEIGHT, '--caption', WEIGHT, '--num_captions', 3, '--min_itm', 0.5, '--keep', keep]
    monkeypatch.setattr(capfilt, 'scores', lambda net, pixels, texts: (
        torch.zeros(1, 4), torch.zeros(1, 4, 4), torch.zeros(1, 4), torch.tensor([[0.4, 0.6, 0.2, 0.9]])))
    assert main(tar, tmp_path / 'out', *options) == 0
    samples = dict(read_samples(str(tmp_path / 'out/filtered/0.tar')))
    assert {key.replace('00000', 'a') for key in samples} == expected
    captions = table(tmp_path / 'out', '0')[0]['caption_dlip']
    if expected:
        first = samples['00000']
        assert first['txt'].decode() == captions[2] and json.loads(first['json'])['source'] == 'dlip'


def test_bad_samples_are_named_and_cost_themselves(here, tmp_path, capsys):
    good, text = sample('a star', 1), {'txt': b'a text alone'}
    path = write_tar(tmp_path / '0.tar', [good, good | {'jpg': b'no image'}, text, sample('!', 2),
                                          sample('\udcff', 3), {'pdf': b'a file of another kind'}])
    with open(path, 'r+b') as file:  # the header of a text: the record stands in
        file.seek(file.read().index(b'00000.txt'))
        file.write(b'X')
    assert main(path, tmp_path / 'out', '--retrieval', WEIGHT, '--min_cosine', -1) == 0
    rows = {row['key']: row for row in table(tmp_path / 'out', '0')}
    assert [key for key, row in rows.items() if row['error']] == ['00001', '00002']
    assert '00001.jpg is not a readable image' in rows['00001']['error'] and rows['00002']['error'] == 'no image'
    assert rows['00000']['caption'] == 'a star'
    assert rows['00003']['itm'] is None and rows['00004']['itm'] is None, 'texts without a word'
    assert '2 samples without a readable image, for example 00001.jpg' in capsys.readouterr().out
    assert len(np.load(tmp_path / 'out/img_emb/img_emb_0.npy')) == 3
    assert [key for key, _ in read_samples(str(tmp_path / 'out/filtered/0.tar'))] == ['00000']


def test_damaged_and_unreadable_shards(here, tmp_path, capsys):
    """What a damaged one holds is used; what cannot be read now is left for the next run."""
    tar = write_tar(tmp_path / '0.tar', [sample(f'star {i}', i) for i in range(6)])
    (tmp_path / '1.tar').write_bytes(tar.read_bytes()[:5000])
    (tmp_path / '2.tar').write_bytes(b'<html>not found</html>')
    late = tmp_path / 'late'
    pipe = f'pipe:cat {late} {tmp_path}/3.tar'  # the first is not there
    (tmp_path / '3.tar').write_bytes(tar.read_bytes())
    source = '::'.join([str(tmp_path / f'{i}.tar') for i in range(3)] + [pipe])
    assert main(source, tmp_path / 'out', '--retrieval', WEIGHT) == 1
    done = {path.stem: len(table(tmp_path / 'out', path.stem)) for path in (tmp_path / 'out/captions').iterdir()}
    assert done['0'] == 6 and 0 < done['1'] < 6 and len(done) == 2
    said = capsys.readouterr().out
    assert '1.tar breaks off after' in said and '2.tar is left for the next run' in said and 'No such file' in said
    late.touch()
    assert main(source, tmp_path / 'out', '--retrieval', WEIGHT) == 1
    assert len(table(tmp_path / 'out', '3')) == 6 and '4 shards, 2 of them done already' in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_and_another_one_is_refused(here, tmp_path, monkeypatch):
    for i in range(3):
        write_tar(tmp_path / f'in/{i}.tar', [sample(f'star {i}', i)])
    out, source, write = tmp_path / 'out', str(tmp_path / 'in'), ShardWorker.write

    def stops(self, url, name):
        if name == '1':
            (out / 'captions/1.parquet.tmp0123456789ab').touch()  # of a killed worker
            raise OSError(28, 'No space left on device', str(out / 'captions/1.parquet'))
        return write(self, url, name)
    monkeypatch.setattr(ShardWorker, 'write', stops)
    with pytest.raises(ValueError, match='1.parquet.*: the disk is full, make room'):
        main(source, out, '--retrieval', WEIGHT)
    assert sorted(path.name for path in (out / 'captions').iterdir() if 'tmp' not in path.name) == ['0.parquet']
    made = []
    monkeypatch.setattr(ShardWorker, 'write', lambda *given: made.append(given[2]) or write(*given))
    assert main(source, out, '--retrieval', WEIGHT) == 0
    assert made == ['1', '2'] and sorted(path.name for path in (out / 'captions').iterdir()) == \
        ['0.parquet', '1.parquet', '2.parquet']
    with pytest.raises(ValueError, match='made with other settings'):
        main(source, out, '--retrieval', WEIGHT, '--min_itm', 0.5)
    Path(source).rename(tmp_path / 'other')
    with pytest.raises(ValueError, match=r'0.parquet was made of .*in/0.tar, not of .*other/0.tar: name another --out'):
        main(tmp_path / 'other', out, '--retrieval', WEIGHT)
    with pytest.raises(ValueError, match='two shards have the name 0'):
        main(f'{tmp_path}/other::{tmp_path}/other', out, '--retrieval', WEIGHT)


def test_a_shard_that_kills_its_workers_is_given_up(here, tmp_path):
    options = shards.parsed(['-', '--out', str(tmp_path), '--retrieval', WEIGHT])
    worker = ShardWorker(options)
    (tmp_path / 'captions').mkdir()
    (tmp_path / 'captions/0.attempts').write_bytes(b'....')
    report = json.loads(worker({'name': ['0'], 'url': [b'0.tar']})['report'][0])
    assert report == {'name': '0', 'failed': '4 workers died at it'} and not list((tmp_path / 'captions').iterdir())


@pytest.mark.parametrize('arguments, problem', [
    (['--min_itm', '0.5', '--caption', WEIGHT], '--retrieval is needed for a filter'),
    ([], '--caption or --retrieval is needed')])
def test_options_that_do_not_go_together(tmp_path, arguments, problem, capsys):
    with pytest.raises(SystemExit):
        main('0.tar', tmp_path / 'out', *arguments)
    assert problem in capsys.readouterr().err


# ---------------------------------------------------------------- Ray itself

def slow(folder: Path, count: int, seconds: float) -> str:
    """A source of shards that take a while, 3 samples each."""
    tars = [write_tar(folder / f'{i}.tar', [sample(f'star {i}', i + j) for j in range(3)]) for i in range(count)]
    return '::'.join(f'pipe:sleep {seconds}; cat {tar}' for tar in tars)


def wait_for(count: int, out: Path, process: Python) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob('captions/*.parquet'))) < count:
        assert time.monotonic() < deadline and process.process.is_alive()
        time.sleep(0.05)


def family(pid: int) -> set[int]:
    """A process and all that come from it."""
    parents = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(')')[2].split()[1])
        except OSError:  # it has ended
            pass
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def open_to_others(pids: set[int]) -> list[str]:
    """The TCP and UDP sockets of processes that are bound or connected to more than the loopback, in hexadecimal."""
    inodes = set()
    for pid in pids:
        for link in Path(f'/proc/{pid}/fd').glob('*'):
            try:
                inodes.add(os.readlink(link).removeprefix('socket:[').rstrip(']'))
            except OSError:
                pass
    ours = []
    for kind in ('tcp', 'tcp6', 'udp', 'udp6'):
        for line in Path(f'/proc/net/{kind}').read_text().splitlines()[1:]:
            local, remote, inode = (line.split()[i] for i in (1, 2, 9))
            if inode in inodes:
                ours.append((kind, *(address.rpartition(':')[0] for address in (local, remote))))
    assert len(ours) > 5, 'the sockets of Ray are seen'
    loopback, nowhere = ('0100007F', '0000000000000000FFFF00000100007F', '0' * 24 + '01000000'), ('0' * 8, '0' * 32)
    return [socket for socket in ours if socket[1] not in loopback or socket[2] not in (*loopback, *nowhere)]


@pytest.mark.skipif(not Path('/proc/net/tcp').exists(), reason='needs Linux')
def test_on_this_machine_it_talks_to_nobody_else_and_a_stop_loses_nothing(here, tmp_path):
    pytest.importorskip('ray')
    source, out, log = slow(tmp_path, 5, 0.5), tmp_path / 'out', tmp_path / 'log'
    arguments = [source, '--out', out, '--retrieval', WEIGHT, '--device', 'cpu']
    process = Python(watched.__file__, log, 'prod.shards', *arguments, '--workers', 1)
    wait_for(1, out, process)
    pids = family(process.pid)
    assert not open_to_others(pids)
    os.kill(process.pid, signal.SIGTERM)
    ended = process.wait()
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert 'stopped by SIGTERM' in ended.stderr and 'Traceback' not in ended.stderr
    assert not log.exists(), log.read_text()
    deadline = time.monotonic() + 10
    while any(Path(f'/proc/{pid}').exists() for pid in pids):
        assert time.monotonic() < deadline, 'Ray has ended with it'
        time.sleep(0.05)
    assert len(list(out.glob('captions/*.parquet'))) < 5
    assert main(*arguments[:1], out, '--retrieval', WEIGHT) == 0
    assert sorted(path.name for path in out.glob('captions/*')) == [f'{i}.parquet' for i in range(5)]


def test_a_cluster_that_loses_a_node_loses_nothing(tmp_path, monkeypatch):
    pytest.importorskip('ray')
    monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', '0')
    from ray.cluster_utils import Cluster
    count, out, options = 6, tmp_path / 'out', {'num_cpus': 1, 'object_store_memory': 2 ** 27}
    cluster = Cluster(initialize_head=True, head_node_args=options | {'include_dashboard': False})
    try:
        node = cluster.add_node(**options)
        process = Python('prod/shards.py', slow(tmp_path, count, 2), '--out', out, '--retrieval', WEIGHT, '--min_itm',
                         0, RAY_ADDRESS=cluster.address)
        wait_for(2, out, process)
        cluster.remove_node(node, allow_graceful=False)
        ended = process.wait()
    finally:
        cluster.shutdown()
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in out.glob('captions/*')) == [f'{i}.parquet' for i in range(count)]
    for i in range(count):
        assert [row['caption'] for row in table(out, str(i))] == [f'star {i}'] * 3
        assert len(list(read_samples(str(out / f'filtered/{i}.tar')))) == 3
    assert len(list(out.glob('*/*'))) == 6 * count
