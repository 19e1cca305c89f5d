"""Zero-shot classification: the demo's teacher tells shapes and colours that it reads about, by folders of images."""

import json
import random

import pytest
import torch
from processes import joined

from data.scenes import COLOURS, SHAPES, Scene, Thing, render
from eval import zeroshot
from eval.zeroshot import ClassFolders, class_feats, zeroshot_metrics
from models.weights.checkpoint import load_model
from utils import ROOT

TEACHER = str(ROOT / 'data' / 'demo_teacher.pth')
PROMPTS = {'shape': [f'white background with a large {colour} {{}} in the center' for colour in COLOURS],
           'colour': [f'a large {{}} {shape} in the center on white' for shape in SHAPES]}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """The same images, one of each shape and colour, in a folder per shape, and in one per colour."""
    root, rng = tmp_path_factory.mktemp('classes'), random.Random(0)
    for shape in SHAPES:
        for colour in COLOURS:
            picture = render(Scene('single', 'center', (Thing(shape, colour, size='large'),), 'white'), rng)
            for kind, name in (('shape', shape), ('colour', colour)):
                folder = root / kind / name
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f'{shape}_{colour}.jpg')
    for kind, prompts in PROMPTS.items():
        (root / f'{kind}.txt').write_text('\n'.join(prompts) + '\n')
    return root


@pytest.mark.parametrize('kind, classes, least', [('shape', SHAPES, 45), ('colour', COLOURS, 95)])
def test_the_demo_teacher_knows_shapes_and_colours(folders, tmp_path, capsys, kind, classes, least):
    """Far above chance, 17% and 14%."""
    zeroshot.main(['--checkpoint', TEACHER, '--root', str(folders / kind), '--templates', str(folders / f'{kind}.txt'),
                   '--output_dir', str(tmp_path), '--device', 'cpu'])
    result = json.loads((tmp_path / 'zeroshot.json').read_text())
    assert result['top1'] >= least and result['top5'] >= 90
    assert result['top1'] == pytest.approx(100 * sum(
        row['class'] == row['predicted'] for row in result['images']) / 42)
    assert {row['class'] for row in result['classes']} == set(classes)
    assert '| top1' in capsys.readouterr().out
    assert (tmp_path / 'zeroshot.html').read_text().count('<img') == 42


@pytest.mark.slow
def test_two_processes_give_the_same(folders, tmp_path):
    options = ['--checkpoint', TEACHER, '--root', str(folders / 'shape'), '--device', 'cpu']
    zeroshot.main([*options, '--output_dir', str(tmp_path / 'one')])
    for done in joined(2, '-m', 'eval.zeroshot', *options, '--output_dir', tmp_path / 'two'):
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / 'zeroshot.json').read_text()) for name in ('one', 'two'))
    assert one['classes'] == two['classes'] and [row['image'] for row in one['images']] == [
        row['image'] for row in two['images']]


def test_a_class_is_the_mean_of_its_prompts():
    model, tokenizer, _ = load_model(TEACHER)
    feats = class_feats(model, tokenizer, ['red_star', 'heart'], ['a {}', 'two {}s'])
    with torch.no_grad():
        own = torch.cat([model.text_feat(*tokenizer([text], 30)) for text in ('a red star', 'two red stars')]).mean(0)
    torch.testing.assert_close(feats[0], own / own.norm(), rtol=1e-5, atol=1e-6)


def test_metrics_by_hand():
    scores = torch.tensor([[.9, .1, .0], [.2, .8, .0], [.1, .9, .0], [.0, .1, .9], [.0, .9, .1], [.9, .0, .1]])
    metrics, classes = zeroshot_metrics(scores, [0, 0, 0, 2, 2, 1], ['a', 'b', 'c'])
    assert metrics == {'top1': pytest.approx(100 / 3), 'class_mean': pytest.approx((100 / 3 + 0 + 50) / 3)}
    assert [row['class'] for row in classes] == ['b', 'a', 'c']
    assert classes[1] == {'class': 'a', 'images': 3, 'top1': pytest.approx(100 / 3), 'taken_for': [['b', 2]]}


def test_bad_input_is_named(folders, tmp_path, picture):
    with pytest.raises(FileNotFoundError, match='no folder .*none: --root is a folder'):
        ClassFolders(tmp_path / 'none', 32)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='empty'):
        ClassFolders(tmp_path, 32)
    (tmp_path / 'empty/.hidden.jpg').touch()
    (tmp_path / '.thumbs').mkdir()
    (tmp_path / '@eaDir').mkdir()
    picture.save(tmp_path / 'empty/a.jpg')
    for folder in ('.thumbs', '@eaDir', 'empty'):
        picture.save(tmp_path / folder / 'a.jpg')
    assert (ClassFolders(tmp_path, 32).classes, len(ClassFolders(tmp_path, 32))) == (['empty'], 1)
    (tmp_path / 'templates.txt').write_text('a photo\n')
    with pytest.raises(ValueError, match="one prompt a line, .*got .'a photo'."):
        zeroshot.read_templates(tmp_path / 'templates.txt')
