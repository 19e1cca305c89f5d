"""json_dataset.py: from the folders of the sources to all.json."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import json_dataset
from data import scene_layouts
from utils import ROOT

FILES = {'cc3m': 'cc3m.json', 'mscoco': 'coco.json', 'sbu': 'sbu.json', 'vgo': 'vgo.json'}
REGION = {'region_id': 1, 'image_id': 1, 'x': 0, 'y': 0, 'width': 400, 'height': 400,
          'phrase': 'a dog on the green lawn'}


def write_shard(folder: Path, captions: dict[str, str | None], parquet: dict | None = None) -> Path:
    """A shard folder with an image (bytes that are never opened) and side files for every key."""
    folder.mkdir(parents=True)
    for key, caption in captions.items():
        (folder / f'{key}.jpg').write_bytes(b'picture')
        if caption is not None:
            (folder / f'{key}.json').write_text(json.dumps({'caption': caption, 'key': key}))
    if parquet:
        pq.write_table(pa.table(parquet), folder.with_suffix('.parquet'))
    return folder


def write_genome(folder: Path, entries) -> Path:
    (folder / 'VG_100K').mkdir(parents=True)
    (folder / 'VG_100K_2').mkdir()
    (folder / 'VG_100K' / '1.jpg').write_bytes(b'picture')
    (folder / 'VG_100K_2' / '2.jpg').write_bytes(b'picture')
    path = folder / 'region_descriptions.json'
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def run(root: Path, *arguments: str) -> Path:
    out = root / 'dataloader'
    json_dataset.main(['--root', str(root), '--out', str(out), '--workers', '1', *arguments])
    return out


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding='utf-8'))


def test_the_embedded_set_becomes_all_json(tmp_path, capsys):
    scene_layouts.main(['--out', str(tmp_path), '--pretrain', '200', '--flickr_train', '2',
                        '--flickr_val', '2', '--flickr_test', '2', '--workers', '1'])
    out = run(tmp_path, '--workers', '2')
    everything = read(out / 'all.json')
    assert [record['id'] for record in everything] == list(range(len(everything)))
    assert all(set(record) == {'caption', 'image_root', 'id'} for record in everything)
    assert all(os.path.isabs(r['image_root']) and os.path.exists(r['image_root']) for r in everything)
    parts = [(r['caption'], r['image_root']) for name in FILES.values() for r in read(out / name)]
    assert parts == [(record['caption'], record['image_root']) for record in everything]
    success = sum(row['status'] == 'success' for source in ('cc3m', 'mscoco', 'sbu')
                  for row in pq.read_table(tmp_path / source / '00000.parquet').to_pylist())
    assert len(everything) == success + 6  # 3% of 200 pictures are Visual Genome's, with one good region each
    assert 'failed download' in capsys.readouterr().out


def counts(printed: str, source: str) -> dict[str, int]:
    """The row of a source in the summary."""
    lines = [re.split(r' {2,}', line.strip()) for line in printed.splitlines()]
    header = next(line for line in lines if line[0] == 'source')
    row = next(line for line in lines if line[0] == source)
    return dict(zip(header[1:], map(int, row[1:]), strict=True))


def test_parquet_decides_and_every_drop_is_counted(tmp_path, capsys):
    write_shard(tmp_path / 'cc3m' / '00000', dict.fromkeys(('00', '03', '04'), 'from the side file'), {
        'key': ['00', '01', '02', '03', '00', '04'], 'caption': ['a  dog\n', 'b', 'c', ' .', 'a dog', 'a \u3000 dog!'],
        'status': ['success', 'failed_to_download', *['success'] * 4]})
    out = run(tmp_path)
    shard = (tmp_path / 'cc3m' / '00000').resolve()
    assert read(out / 'all.json') == [{'caption': 'a dog', 'image_root': f'{shard}/00.jpg', 'id': 0},
                                      {'caption': 'a dog!', 'image_root': f'{shard}/04.jpg', 'id': 1}]
    assert counts(capsys.readouterr().out, 'cc3m') == {
        'kept': 2, 'failed download': 1, 'missing file': 1, 'empty caption': 1, 'duplicate': 1}


def test_the_same_caption_of_the_same_address_counts_once_in_a_source(tmp_path, capsys):
    for shard, urls in {'00000': ['a', 'b', 'a'], '00001': ['a', 'c', 'b']}.items():
        keys = [f'{shard}{i}' for i in range(3)]
        write_shard(tmp_path / 'sbu' / shard, dict.fromkeys(keys, ''), {
            'key': keys, 'caption': ['one', 'one', 'two'], 'url': urls, 'status': ['success'] * 3})
    shutil.copytree(tmp_path / 'sbu', tmp_path / 'cc3m')
    out = run(tmp_path)
    assert [Path(r['image_root']).stem for r in read(out / 'sbu.json')] == [
        '000000', '000001', '000002', '000011', '000012']
    assert len(read(out / 'all.json')) == 10 and counts(capsys.readouterr().out, 'all')['duplicate'] == 2


def test_failed_downloads_are_listed_until_a_second_try_has_them(tmp_path, capsys):
    def shard(folder, urls, failed):
        keys = [f'{i}' for i in range(len(urls))]
        write_shard(folder, {key: '' for key, url in zip(keys, urls, strict=True) if url not in failed}, {
            'key': keys, 'caption': [f'of {url}' for url in urls], 'url': urls,
            'status': ['failed_to_download' if url in failed else 'success' for url in urls]})
    shard(tmp_path / 'cc3m' / '00000', ['a', 'b', 'c'], 'bc')
    assert pq.read_table(run(tmp_path) / 'cc3m_failed.parquet').to_pylist() == [
        {'url': 'b', 'caption': 'of b'}, {'url': 'c', 'caption': 'of c'}]
    shard(tmp_path / 'cc3m' / 'again' / '00000', ['b', 'c'], 'c')  # img2dataset fed with that list
    out = run(tmp_path)
    assert pq.read_table(out / 'cc3m_failed.parquet')['url'].to_pylist() == ['c']
    assert sorted(record['caption'] for record in read(out / 'all.json')) == ['of a', 'of b']


def test_histograms(tmp_path):
    write_shard(tmp_path / 'cc3m' / '00000', {'0': '', '1': ''}, {
        'key': ['0', '1'], 'caption': ['a dog', ' '.join(['long'] * 90)], 'status': ['success'] * 2,
        'width': [256, 256], 'height': [192, 300], 'original_width': [640, None], 'original_height': [20000, None]})
    write_genome(tmp_path / 'vgo', [{'id': 1, 'regions': [REGION]}])
    tallies = json_dataset.build(tmp_path, json_dataset.make_output_dir(tmp_path / 'out'), ['cc3m', 'vgo'], 1)
    words, stored, published = tallies['cc3m'].histograms
    assert words[1] == words[-1] == 1 and words.sum() == 2
    edges = json_dataset.PANELS['shorter side as stored (pixels)']
    assert [edges[i] <= side < edges[i + 1] for i, side in zip(np.flatnonzero(stored), (192, 256), strict=True)]
    assert published.sum() == 1  # the other one is not recorded
    assert [int(counts.sum()) for counts in tallies['vgo'].histograms] == [1, 0, 0]
    with Image.open(run(tmp_path) / 'pairs.png') as picture:
        assert picture.format == 'PNG' and picture.width > 1000


@given(st.lists(st.lists(st.integers(0, 50)), max_size=12))
def test_seen_is_a_set(parts):
    seen, reference = json_dataset.Seen(), set()
    for part in parts:
        values = np.array(part, np.uint64)
        assert seen.holds(values).tolist() == [value in reference for value in part]
        new = seen.add(values)
        assert new.tolist() == [value not in reference and value not in part[:i] for i, value in enumerate(part)]
        reference |= set(part)


def test_at_most_so_many_shards_are_under_way():
    class Pool:
        started = taken = most = 0

        def submit(self, function, item):
            self.started += 1
            self.most = max(self.most, self.started - self.taken)
            return self

        def result(self):
            self.taken += 1
            return self.taken
    pool = Pool()
    assert list(json_dataset.in_order(pool, abs, list(range(100)), 4)) == list(range(1, 101)) and pool.most == 4


@pytest.mark.slow
def test_a_killed_build_is_redone(tmp_path):
    for i in range(40):
        write_shard(tmp_path / 'cc3m' / f'{i:05d}', {f'{i:05d}{j}': 'a dog' for j in range(50)})
    out = tmp_path / 'dataloader'
    command = [sys.executable, '-c', 'import os, signal, json_dataset\n'
               'json_dataset.Tally.add = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n'
               'json_dataset.main()', '--root', str(tmp_path), '--out', str(out), '--workers', '1']
    killed = subprocess.Popen(command, cwd=ROOT)
    assert killed.wait(60) == -signal.SIGKILL
    assert len(os.listdir(out)) > 1 and all('.tmp' in name or name == '.lock' for name in os.listdir(out))
    run(tmp_path)
    assert len(read(out / 'all.json')) == 2000
    assert sorted(os.listdir(out)) == ['.lock', 'all.json', 'cc3m.json', 'cc3m_failed.parquet', 'pairs.png']


def test_a_shard_whose_download_was_killed(tmp_path, capsys):
    """Its parquet has no end, and neither has its last record."""
    shard = write_shard(tmp_path / 'cc3m' / '00000', {'0': 'a dog', '1': 'a cat'})
    shard.with_suffix('.parquet').write_bytes(b'PAR1 and no end')
    (shard / '1.json').write_text('{"caption": "a c')
    write_shard(tmp_path / 'cc3m' / '00001', {'2': 'half \ud83d an emoji'})
    assert [r['caption'] for r in read(run(tmp_path) / 'all.json')] == ['a dog', 'half an emoji']
    printed = capsys.readouterr().out
    assert '00000.parquet is broken' in printed and counts(printed, 'cc3m')['broken record'] == 1


def test_webdataset_shards_are_said_to_need_no_all_json(tmp_path):
    (tmp_path / 'sbu').mkdir()
    for name in ('00000.tar', '00000.parquet', '00000_stats.json'):
        (tmp_path / 'sbu' / name).touch()
    with pytest.raises(ValueError, match='sbu holds webdataset shards .* by data.train=.*sbu; leave sbu out'):
        run(tmp_path)


def test_side_files_without_parquet(tmp_path):
    shard = write_shard(tmp_path / 'sbu' / '00000', {'0': 'from json', '1': None, '2': None})
    (shard / '1.txt').write_text('vom Text, für alle', encoding='utf-8')
    assert [r['caption'] for r in read(run(tmp_path) / 'sbu.json')] == ['from json', 'vom Text, für alle']


def test_ids_continue_over_shards_and_sources(tmp_path):
    for source in ('cc3m', 'sbu'):
        for shard in ('00000', '00001'):
            write_shard(tmp_path / source / shard, {f'{shard}0': f'{source} {shard}'})
    out = run(tmp_path)
    assert [(r['id'], r['caption']) for r in read(out / 'all.json')] == [
        (0, 'cc3m 00000'), (1, 'cc3m 00001'), (2, 'sbu 00000'), (3, 'sbu 00001')]
    assert [r['id'] for r in read(out / 'sbu.json')] == [0, 1]


def test_visual_genome_keeps_long_phrases_of_large_regions(tmp_path):
    write_genome(tmp_path / 'vgo', [
        {'id': 1, 'regions': [REGION, {**REGION, 'phrase': 'a dog on lawn'},
                              {**REGION, 'width': 240, 'height': 400},  # 96,000 pixels are 20%, not more
                              {**REGION, 'width': 241, 'phrase': 'the cat sleeps in sunshine'}, REGION]},
        {'id': 2, 'regions': [REGION]}, {'id': 3, 'regions': [REGION]}])
    records = read(run(tmp_path) / 'vgo.json')
    assert [(Path(r['image_root']).parts[-2:], r['caption']) for r in records] == [
        (('VG_100K', '1.jpg'), 'a dog on the green lawn'),
        (('VG_100K', '1.jpg'), 'the cat sleeps in sunshine'),
        (('VG_100K_2', '2.jpg'), 'a dog on the green lawn')]


def test_missing_sources_are_named_and_skipped(tmp_path, capsys):
    write_shard(tmp_path / 'sbu' / '00000', {'0': 'a dog'})
    out = run(tmp_path)
    printed = capsys.readouterr().out
    assert all(f'{source}: not there, skipped' in printed for source in ('cc3m', 'mscoco', 'vgo'))
    assert sorted(path.name for path in out.iterdir()) == \
        ['.lock', 'all.json', 'pairs.png', 'sbu.json', 'sbu_failed.parquet']


def test_sources_can_be_chosen(tmp_path):
    for source in ('cc3m', 'sbu'):
        write_shard(tmp_path / source / '00000', {'0': source})
    assert [r['caption'] for r in read(run(tmp_path, '--sources', 'sbu') / 'all.json')] == ['sbu']


def test_a_caption_that_is_no_text_is_dropped(tmp_path):
    shard = write_shard(tmp_path / 'cc3m' / '00000', {'0': 'a dog', '1': None})
    (shard / '1.json').write_text('{"caption": 5}')
    assert [r['caption'] for r in read(run(tmp_path) / 'all.json')] == ['a dog']


def test_no_usable_pair_leaves_good_output(tmp_path):
    write_shard(tmp_path / 'cc3m' / '00000', {'0': ' '})
    (tmp_path / 'dataloader').mkdir()
    (tmp_path / 'dataloader' / 'cc3m.json').write_text('[1]')
    with pytest.raises(ValueError, match='no usable pair'):
        run(tmp_path)
    assert read(tmp_path / 'dataloader' / 'cc3m.json') == [1]


def test_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match='no data folder'):
        run(tmp_path / 'absent')
    with pytest.raises(FileNotFoundError, match='none of cc3m, mscoco, sbu, vgo'):
        run(tmp_path)
    (tmp_path / 'cc3m').mkdir()
    with pytest.raises(ValueError, match='cc3m holds no img2dataset shards'):
        run(tmp_path)


def parquet_without_captions(root: Path) -> Path:
    shard = write_shard(root / 'cc3m' / '00000', {'0': 'a'}, {'key': ['0'], 'text': ['a']})
    return shard.with_suffix('.parquet')


def parquet_with_captions_twice(root: Path) -> Path:
    path = write_shard(root / 'cc3m' / '00000', {'0': 'a'}).with_suffix('.parquet')
    texts = pa.array(['0'])
    pq.write_table(pa.Table.from_arrays(4 * [texts], ['key', 'caption', 'status', 'caption']), path)
    return path


def broken_genome(root: Path) -> Path:
    return write_genome(root / 'vgo', '[{"id": 1, ')


def genome_of_another_schema(root: Path) -> Path:
    return write_genome(root / 'vgo', [{'image': 1}])


def genome_in_bytes(root: Path) -> Path:
    path = write_genome(root / 'vgo', '[]')
    path.write_bytes(b'\xff\xfe[]')
    return path


def broken_after_a_good_source(root: Path) -> Path:
    write_shard(root / 'cc3m' / '00000', {'0': 'a dog'})
    return broken_genome(root)


BREAKAGES = [parquet_without_captions, parquet_with_captions_twice, broken_genome, genome_of_another_schema,
             genome_in_bytes, broken_after_a_good_source]


@pytest.mark.parametrize('breakage', BREAKAGES)
def test_a_broken_file_is_named_and_good_output_stays(tmp_path, breakage):
    broken = breakage(tmp_path)
    out = tmp_path / 'dataloader'
    out.mkdir()
    (out / 'all.json').write_text('[]')
    with pytest.raises(ValueError) as caught:
        run(tmp_path)
    assert str(broken) in str(caught.value)
    assert sorted(os.listdir(out)) == ['.lock', 'all.json'] and read(out / 'all.json') == []


def test_parquet_whose_types_drift(tmp_path, capsys):
    """pandas makes numbers of keys, floats of sizes and of captions that are all missing; others write other texts."""
    captions, nan = ['a dog', None, 'a cat'], float('nan')
    kinds = {'00000': ([0, 1, 2], pa.array(captions), pa.array([256.0, nan, 192.0])),
             '00001': ([0.0, 1.0, 2.0], pa.array([nan] * 3), pa.array([256, None, 192])),
             '00002': (['000', '001', '002'], pa.array(captions).dictionary_encode(), pa.nulls(3)),
             '00003': ([0, 1, 2], pa.array(captions, pa.large_string()), pa.array(['256', 'x', '1'])),
             '00004': ([0, 1, 2], pa.array([b'a dog', None, b'a c\xe9at']), pa.array([2.5, nan, 1e30])),
             '00005': ([0, 1, 2], pa.nulls(3), pa.array([256, 256, 256], pa.uint16()))}
    for shard, (keys, texts, sizes) in kinds.items():
        write_shard(tmp_path / 'cc3m' / shard, dict.fromkeys(('000', '001', '002'), 'from a side file'), {
            'width': sizes, 'height': sizes, 'key': keys, 'caption': texts,
            'status': pa.array(['success'] * 3).dictionary_encode()})
    records = read(run(tmp_path) / 'cc3m.json')
    assert [r['caption'] for r in records] == ['a dog', 'a cat'] * 4
    assert [Path(r['image_root']).name for r in records] == ['000.jpg', '002.jpg'] * 4
    printed = capsys.readouterr().out
    assert 'broken' not in printed and counts(printed, 'cc3m') == {'kept': 8, 'empty caption': 10}


def test_a_broken_side_file_costs_one_pair(tmp_path, capsys):
    odd = {'0': '[' * 100_000, '1': '{"caption": "a', '2': '5', '5': '\ufeff{"caption": "a cat"}',
           '3': '{"caption": "a dog", "width": NaN, "height": "x"}', '6': '{"caption": NaN}',
           '4': '{"caption": "a dog, far", "width": 1e300, "original_width": [], "url": 7}'}
    shard = write_shard(tmp_path / 'cc3m' / '00000', dict.fromkeys([*odd, '7', '8', '9'], 'a bird'))
    for key, text in odd.items():
        (shard / f'{key}.json').write_text(text, encoding='utf-8')
    (shard / '7.json').unlink()
    (shard / '7.json').mkdir()
    (shard / '8.json').write_bytes(b'{"caption": "\xff"}')
    (shard / '9.json').unlink()
    os.mkfifo(shard / '9.json')
    os.mkfifo(shard.with_suffix('.parquet'))
    assert [r['caption'] for r in read(run(tmp_path) / 'all.json')] == ['a dog', 'a dog, far', 'a cat']
    assert counts(capsys.readouterr().out, 'cc3m') == {'kept': 3, 'broken record': 6, 'empty caption': 1}


def test_folders_in_the_sources_and_the_default_output(tmp_path):
    for folder in ('cc3m/cc3m', 'mscoco/mscoco', 'sbu/sbucaptions', 'sbu/sbucaptions/again'):
        write_shard(tmp_path / folder / '00000', {'0': f'of {folder}'})
    json_dataset.main(['--root', str(tmp_path), '--workers', '1'])
    assert [r['caption'] for r in read(tmp_path / 'dataloader' / 'all.json')] == [
        'of cc3m/cc3m', 'of mscoco/mscoco', 'of sbu/sbucaptions/again', 'of sbu/sbucaptions']
    assert '/datadrive' in json_dataset.__doc__
