"""json_dataset.py: from the folders of the sources to all.json."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import json_dataset
from data import scene_layouts

FILES = {'cc3m': 'cc3m.json', 'mscoco': 'coco.json', 'sbu': 'sbu.json', 'vgo': 'vgo.json'}
REGION = {'region_id': 1, 'image_id': 1, 'x': 0, 'y': 0, 'width': 400, 'height': 400,
          'phrase': 'a dog on the green lawn'}


def write_shard(folder: Path, captions: dict[str, str | None], parquet: dict | None = None) -> Path:
    """A shard folder with a picture (bytes that are never opened) and side files for every key."""
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


def test_parquet_decides_and_every_drop_is_counted(tmp_path, capsys):
    write_shard(tmp_path / 'cc3m' / '00000', dict.fromkeys(('00', '03', '04'), 'from the side file'), {
        'key': ['00', '01', '02', '03', '00'], 'caption': ['a  dog\n', 'b', 'c', ' ', 'again'],
        'status': ['success', 'failed_to_download', 'success', 'success', 'success']})
    out = run(tmp_path)
    picture = str((tmp_path / 'cc3m' / '00000' / '00.jpg').resolve())
    assert read(out / 'all.json') == [{'caption': 'a dog', 'image_root': picture, 'id': 0}]
    header, row = (line.split('  ') for line in capsys.readouterr().out.splitlines()[-4:-2])
    counts = dict(zip([h.strip() for h in header if h], [r.strip() for r in row if r], strict=True))
    assert counts == {'source': 'cc3m', 'kept': '1', 'failed download': '1', 'missing file': '1',
                      'empty caption': '1', 'duplicate': '1'}


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
                              {**REGION, 'width': 241, 'phrase': 'the cat sleeps in sunshine'}]},
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
    assert sorted(path.name for path in out.iterdir()) == ['all.json', 'sbu.json']


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


def broken_parquet(root: Path) -> Path:
    path = write_shard(root / 'cc3m' / '00000', {'0': 'a dog'}).with_suffix('.parquet')
    path.write_bytes(b'not a table')
    return path


def parquet_without_captions(root: Path) -> Path:
    shard = write_shard(root / 'cc3m' / '00000', {'0': 'a'}, {'key': ['0'], 'text': ['a']})
    return shard.with_suffix('.parquet')


def broken_record(root: Path) -> Path:
    path = write_shard(root / 'cc3m' / '00000', {'0': 'a dog', '1': 'a cat'}) / '1.json'
    path.write_text('{"caption": "a c')
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


BREAKAGES = [broken_parquet, parquet_without_captions, broken_record, broken_genome, genome_of_another_schema,
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
    assert [path.name for path in out.iterdir()] == ['all.json'] and read(out / 'all.json') == []
