"""The embedded data set: scenes, their captions and the parser, and the folders written to disk."""

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import scene_layouts
from data.captions import PROMPT
from data.scene_captions import captions, parse, slots_match, vocabulary
from data.scenes import ARRANGEMENTS, BACKGROUNDS, COLOURS, FILLS, SHAPES, SIZES, Scene, render, sample_split
from data.transforms import swap_left_right
from models.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SMALL = ['--pretrain', '120', '--flickr_train', '6', '--flickr_val', '4', '--flickr_test', '8']


@pytest.fixture(scope='module')
def scenes() -> list[Scene]:
    return sample_split('train', 1500, seed=1, distinct=False)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('scenes') / 'set'
    scene_layouts.main(['--out', str(out), *SMALL, '--workers', '2'])
    return out


def mirrored(scene: Scene) -> Scene:
    if scene.kind == 'single':
        return replace(scene, arrangement=swap_left_right(scene.arrangement))
    turned = (scene.kind, scene.arrangement) in (('pair', 'left'), ('triple', 'row'))
    return replace(scene, things=scene.things[::-1]) if turned else scene


def one_slot_changed(scene: Scene):
    """Scenes that differ in one shape, colour, arrangement, count or in the order of the things."""
    for i, thing in enumerate(scene.things):
        others = [replace(thing, shape=shape) for shape in SHAPES if shape != thing.shape]
        others += [replace(thing, colour=colour) for colour in COLOURS if colour != thing.colour]
        for other in others:
            yield replace(scene, things=(*scene.things[:i], other, *scene.things[i + 1:]))
    for arrangement in ARRANGEMENTS[scene.kind]:
        if arrangement != scene.arrangement:
            yield replace(scene, arrangement=arrangement)
    if scene.kind == 'group':
        yield replace(scene, count=5 - scene.count)
    if len(scene.things) > 1:
        yield replace(scene, things=scene.things[::-1])


def fingerprint() -> str:
    """Of some scenes, captions and pixels."""
    digest = hashlib.sha256()
    for i, scene in enumerate(sample_split('val', 40, seed=3, distinct=True)):
        digest.update(f'{scene.key} {captions(scene)}'.encode())
        digest.update(render(scene, random.Random(i)).tobytes())
    return digest.hexdigest()


def test_scenes_do_not_depend_on_the_process():
    code = 'from test_scenes import fingerprint; print(fingerprint())'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                          env={'PYTHONHASHSEED': '1', 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})
    assert done.stdout.strip() == fingerprint()


def test_splits_are_disjoint_and_held_out_scenes_distinct(scenes):
    test, val = (sample_split(split, 400, seed=2, distinct=True) for split in ('test', 'val'))
    keys = [{scene.key for scene in part} for part in (scenes, test, val)]
    assert len(keys[1]) == len(keys[2]) == 400
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_things_of_a_scene_can_be_told_apart(scenes):
    for scene in scenes:
        assert len({(thing.shape, thing.colour) for thing in scene.things}) == len(scene.things)


def test_scene_survives_json(scenes):
    for scene in scenes[:200]:
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_every_caption_is_true_and_short(scenes):
    for scene in scenes:
        texts = captions(scene)
        assert len(set(texts)) == 5
        for text in texts:
            assert slots_match(text, scene), text
            assert len(text.split()) <= 21 and re.fullmatch('[a-z, ]+', text), text


def test_captions_are_false_of_a_changed_scene(scenes):
    for scene in scenes[:300]:
        for other in one_slot_changed(scene):
            assert not any(slots_match(text, other) for text in captions(scene)), (captions(scene), other)


def test_a_wrong_size_fill_or_background_is_noticed(scenes):
    for scene in scenes[:300]:
        for text in captions(scene):
            for words in (SIZES, FILLS, BACKGROUNDS):
                for said in (word for word in words if word in text.split()):
                    for wrong in set(words) - {said}:
                        assert not slots_match(re.sub(rf'\b{said}\b', wrong, text, count=1), scene)


def test_captions_stay_true_of_the_mirrored_picture(scenes):
    """The training transform mirrors images and exchanges 'left' and 'right' in their captions."""
    for scene in scenes:
        for text in captions(scene):
            assert slots_match(swap_left_right(text), mirrored(scene)), text


@pytest.mark.parametrize('text', ['', 'a dog', 'a red star above', 'a red star above a mauve star',
                                  'two red stars above a blue star',
                                  'a red star above a blue star on black on white',
                                  'a small large red star above a blue star'])
def test_other_texts_are_not_parsed(text):
    assert parse(text) is None


def test_captions_tell_held_out_scenes_apart():
    """Drawn at random from the scenes that it fits, a caption's own is found in 97% of the draws."""
    scenes = sample_split('test', 300, seed=5, distinct=True)
    fits = [1 / sum(slots_match(text, other) for other in scenes) for scene in scenes for text in captions(scene)]
    assert sum(fits) / len(fits) >= 0.97


def test_vocabulary_covers_every_caption(scenes):
    words = vocabulary()
    assert len(set(words)) == len(words)
    tokenizer = Tokenizer(words)
    for text in ['a picture of a cat', *(text for scene in scenes[:400] for text in captions(scene))]:
        ids, _ = tokenizer([text], 64)
        assert words.index('[UNK]') not in ids[0].tolist()
        assert text == 'a picture of a cat' or set(re.findall('[a-z]+', text)) <= set(words)


def test_pictures_show_the_named_colours(scenes):
    """By the nearest colour name of each pixel: the background leads, then the thing's colour."""
    named = COLOURS | BACKGROUNDS
    for i, scene in enumerate(scene for scene in scenes[:300] if scene.kind == 'single'):
        picture = render(scene, random.Random(i)).resize((64, 64), Image.Resampling.BICUBIC)
        counts = dict.fromkeys(named, 0)
        for number, pixel in picture.getcolors(64 * 64):
            counts[min(named, key=lambda name: math.dist(named[name], pixel))] += number
        assert max(counts, key=counts.get) == scene.background
        assert max(COLOURS, key=counts.get) == scene.things[0].colour, scene


# ---------------------------------------------------------------- on disk

def test_shards_look_like_img2dataset(folder):
    for source in ('cc3m', 'mscoco', 'sbu'):
        table = pq.read_table(folder / source / '00000.parquet')
        assert table.column_names == ['caption', 'url', 'key', 'status', 'error_message', 'width', 'height',
                                      'original_width', 'original_height', 'exif', 'sha256']
        rows = table.to_pylist()
        good = {row['key']: row['caption'] for row in rows if row['status'] == 'success'}
        stats = json.loads((folder / source / '00000_stats.json').read_text())
        assert (stats['count'], stats['successes']) == (len(rows), len(good))
        pictures = sorted((folder / source / '00000').glob('*.jpg'))
        assert [path.stem for path in pictures] == sorted(good)
        for path in pictures:
            assert path.with_suffix('.txt').read_text() == good[path.stem]
            assert json.loads(path.with_suffix('.json').read_text())['caption'] == good[path.stem]


def test_flickr_annotations_agree_and_are_held_out(folder):
    flickr = folder / 'flickr30k'
    known = json.loads((flickr / 'scenes.json').read_text())
    karpathy = json.loads((flickr / 'dataset_flickr30k.json').read_text())['images']
    for split, count in (('train', 6), ('val', 4), ('test', 8)):
        images = [entry for entry in karpathy if entry['split'] == split]
        assert len(images) == count
        for entry in images:
            scene = Scene.from_dict(known[entry['filename']])
            assert scene.split == split and len(entry['sentences']) == 5
            assert all(slots_match(sentence['raw'], scene) for sentence in entry['sentences'])
            with Image.open(flickr / 'flickr30k-images' / entry['filename']) as picture:
                assert picture.size == (128, 128) and picture.mode == 'RGB'
        records = json.loads((flickr / f'flickr30k_{split}.json').read_text())
        assert len(records) == (5 * count if split == 'train' else count)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_a_finished_set_is_left_alone_and_other_arguments_rebuild_it(folder, tmp_path, capsys):
    out = tmp_path / 'set'
    arguments = ['--out', str(out), *SMALL, '--workers', '1']
    scene_layouts.main(arguments)
    first = files(out)
    assert first == files(folder)  # whatever the number of workers
    touched = out / 'cc3m' / '00000.parquet'
    before = touched.stat().st_mtime_ns
    capsys.readouterr()
    scene_layouts.main(arguments)
    assert 'already' in capsys.readouterr().out and touched.stat().st_mtime_ns == before
    scene_layouts.main([*arguments, '--seed', '1'])
    second = files(out)
    assert second['flickr30k/scenes.json'] != first['flickr30k/scenes.json']


def test_a_share_of_the_downloads_begins_with_the_prompt(tmp_path):
    scene_layouts.main(['--out', str(tmp_path / 'set'), *SMALL, '--prompted', '0.5'])
    said = [path.read_text() for path in (tmp_path / 'set').rglob('*.txt') if path.name != 'vocab.txt']
    begun = [text for text in said if text.startswith(PROMPT)]
    assert 0.35 < len(begun) / len(said) < 0.65
    assert all(parse(text) == parse(text.removeprefix(PROMPT)) is not None for text in begun)


def test_a_rebuild_removes_only_what_a_build_writes(folder):
    (folder / 'dataloader').mkdir()
    (folder / 'cc3m' / 'stale').mkdir()
    scene_layouts.main(['--out', str(folder), *SMALL, '--seed', '2'])
    assert (folder / 'dataloader').exists() and not (folder / 'cc3m' / 'stale').exists()


def test_an_interrupted_build_is_made_again(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scene_layouts, 'write_flickr_annotation', killed)
        scene_layouts.main(['--out', str(tmp_path / 'set'), *SMALL])
    scene_layouts.main(['--out', str(tmp_path / 'set'), *SMALL])
    assert (tmp_path / 'set' / 'flickr30k' / 'scenes.json').exists()


@pytest.mark.parametrize('name', ['thesis.txt', 'vocab.txt'])  # a tokenizer's folder has a vocab.txt too
def test_a_folder_with_other_files_is_refused(tmp_path, name):
    (tmp_path / name).write_text('mine')
    with pytest.raises(ValueError, match='choose another --out'):
        scene_layouts.main(['--out', str(tmp_path), *SMALL])
    assert (tmp_path / name).read_text() == 'mine'
