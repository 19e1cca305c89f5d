"""Configs: the shipped file is the schema, and a mistake is named with the file and the nearest valid key."""

from pathlib import Path

import pytest

import json_dataset
import pretrain_dlip
import prod.caption
from configs import flat_keys, load_config, read_yaml, script_arguments
from data import scene_layouts
from eval import speed, zeroshot
from prod import app, search
from utils import ROOT, shorten

SCHEMAS = {'pretrain': ['pretrain', 'demo/teacher', 'demo/pretrain'],
           'retrieval_flickr': ['retrieval_flickr', 'demo/retrieval_flickr'],
           'caption_flickr': ['caption_flickr', 'demo/caption_flickr']}


@pytest.mark.parametrize('schema, name', [(s, n) for s, names in SCHEMAS.items() for n in names])
def test_shipped_configs_are_valid(schema, name):
    load_config(ROOT / 'configs' / f'{name}.yaml', f'configs/{schema}.yaml')


def test_published_settings():
    """The original's values, as the README promises them."""
    pretrain = read_yaml(ROOT / 'configs/pretrain.yaml')
    assert pretrain['model']['image_size'] == 224 and pretrain['train'] | {'precision': 0} == pretrain['train'] | {
        'epochs': 20, 'batch_size': 288, 'precision': 0}
    assert pretrain['ita']['queue_size'] == 57600 and pretrain['ita']['alpha'] == 0.4
    optim = pretrain['optim']
    assert [optim[k] for k in ('lr', 'min_lr', 'decay', 'warmup_steps', 'weight_decay')] == [
        5e-4, 1e-6, 0.9, 3000, 0.02]
    retrieval, caption = (read_yaml(ROOT / f'configs/{n}_flickr.yaml') for n in ('retrieval', 'caption'))
    assert retrieval['eval']['k_test'] == 128
    assert (retrieval['optim']['lr'], retrieval['optim']['weight_decay']) == (5e-5, 0.05)
    for config in (retrieval, caption):
        assert (config['model']['image_size'], config['train']['batch_size'], config['train']['epochs']) == (384, 32, 6)


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / 'my.yaml'
    path.write_text((ROOT / 'configs/pretrain.yaml').read_text())
    return path


@pytest.mark.parametrize('old, new, message', [
    ('  queue_size:', '  queue_sise:', 'my.yaml: unknown key "ita.queue_sise"; did you mean "ita.queue_size"'),
    ('  alpha: 0.4 ', '  # ', 'my.yaml: missing key "ita.alpha"'),
    ('queue_size: 57600', 'queue_size: many', 'my.yaml: "ita.queue_size" must be int like 57600; got \'many\''),
    ('negative_all_rank: false', 'negative_all_rank: 1', '"negative_all_rank" must be bool'),
    ('model:', 'model: [', 'my.yaml is not valid YAML')])
def test_a_mistake_in_the_file_is_named(config_file, old, new, message):
    config_file.write_text(config_file.read_text().replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        load_config(config_file, 'configs/pretrain.yaml')
    assert message in str(error.value)


def test_overrides(config_file):
    overrides = ['optim.lr=1e-4', 'teacher.weights=null', 'train.epochs=2']
    config = load_config(config_file, 'configs/pretrain.yaml', overrides)
    assert (config['optim']['lr'], config['teacher']['weights'], config['train']['epochs']) == (1e-4, None, 2)
    for override, message in (('optim.lrr=1', 'did you mean "optim.lr"'), ('optim.lr', 'key=value'),
                              ('train.epochs=x', 'must be int')):
        with pytest.raises(ValueError, match=message):
            load_config(config_file, 'configs/pretrain.yaml', [override])


def test_overrides_stand_anywhere_on_the_command_line():
    args, config = script_arguments('', 'configs/pretrain.yaml', 'out', ['optim.lr=1', '--seed', '7', 'train.epochs=3'])
    assert (config['optim']['lr'], args.seed, config['train']['epochs']) == (1, 7, 3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no config file .*nowhere.yaml'):
        load_config(tmp_path / 'nowhere.yaml', 'configs/pretrain.yaml')


# Paths say where data and first weights lie (init_vision and init_text: the teacher's, which needs no download); sizes
# are of nets, pictures, crops, queues, batches, learning rates and lengths of training.
SIZES_AND_PATHS = {'model.size', 'model.image_size', 'model.init', 'model.init_vision', 'model.init_text',
                   'model.vit_ckpt_layer', 'tokenizer', 'teacher.size', 'teacher.weights', 'ita.queue_size',
                   'ita.momentum', 'ita.alpha_ramp_epochs', 'data.train', 'data.root', 'data.max_tokens',
                   'data.min_scale', 'data.workers', 'optim.lr', 'optim.warmup_steps', 'train.epochs',
                   'train.batch_size', 'train.log_every', 'train.save_every', 'scst.lr', 'eval.k_test'}


@pytest.mark.parametrize('name', SCHEMAS)
def test_the_demo_differs_in_sizes_and_paths_only(name):
    real, demo = (read_yaml(ROOT / 'configs' / folder / f'{name}.yaml') for folder in ('', 'demo'))
    different = set()
    for key in flat_keys(real):
        a, b = real, demo
        for part in key.split('.'):
            a, b = a[part], b[part]
        if a != b:
            different.add(key)
    assert different <= SIZES_AND_PATHS


# ---------------------------------------------------------------- command lines, and what messages quote

TOOLS = {json_dataset: [], zeroshot: ['--checkpoint', 'x', '--root', 'x'], speed: ['--checkpoint', 'x'],
         prod.caption: ['x', '--weight', 'x', '--out', 'x'], search: ['x', 'x', '--weight', 'x', '--index', 'x'],
         app: ['--caption', 'x', '--retrieval', 'x', '--folder', 'x', '--index', 'x'],
         scene_layouts: ['--out', 'x'], pretrain_dlip: []}


@pytest.mark.parametrize('tool, option, values', [
    (json_dataset, '--workers', ['0', '-1', '1e3']), (zeroshot, '--batch_size', ['0', '-1', 'nan']),
    (zeroshot, '--workers', ['-1', 'x']), (speed, '--rounds', ['0', '9' * 5000]),
    (prod.caption, '--batch_size', ['-1', '2.0']), (prod.caption, '--num_beams', ['0']), (search, '--k', ['0', '-3']),
    (search, '--rerank', ['-1']), (app, '--port', ['99999', '-1']),
    (scene_layouts, '--prompted', ['2', 'nan', '-0.1']),
    (scene_layouts, '--kinds', ['single=-1', 'single=inf', 'double=1', 'single=0']),
    (scene_layouts, '--pretrain', ['-1']), (pretrain_dlip, '--seed', ['-1']),
    (pretrain_dlip, '--store_teacher', ['0'])])
def test_numbers_of_command_lines(tool, option, values, capsys):
    for value in values:
        with pytest.raises(SystemExit):
            tool.main([*TOOLS[tool], f'{option}={value}'])
        line = capsys.readouterr().err.splitlines()[-1]
        assert f'error: argument {option}: ' in line and len(line) < 250


CYCLE, BOMB, DEEP = [], ['x'] * 9, 1
CYCLE.append(CYCLE)
for _ in range(9):
    BOMB = [BOMB] * 9
for _ in range(100_000):
    DEEP = {'a': [DEEP]}


@pytest.mark.parametrize('value', ['x\n' * 4_000_000, CYCLE, BOMB, DEEP, {str(i): i for i in range(10 ** 6)},
                                   10 ** 5000, b'\0' * 10 ** 6, Path('x' * 10_000), OSError(1, 'no\n' * 10 ** 6),
                                   '\u2028\x85'],
                         ids=lambda value: type(value).__name__)
def test_a_quoted_value_is_one_short_line(value):
    text = shorten(value)
    assert len(text) <= 400 and len(text.splitlines()) == 1


def test_a_quoted_value_reads_as_itself():
    assert [shorten(x) for x in ('a b', 3, [1.5, None], Path('/my data/a.jpg'), ValueError('it is\nodd'))] == [
        "'a b'", '3', '[1.5, None]', '/my data/a.jpg', 'it is odd']
    assert shorten('a' * 100 + '.tar').endswith(".tar'")
