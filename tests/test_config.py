"""Configs: a file is laid over the shipped one of its script, and a mistake is one line with file, key and remedy."""

import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from runs import run

import json_dataset
import pretrain_dlip
import prod.caption
from configs import flatten, load_config, read_size, read_yaml, script_arguments
from configs.rules import RENAMED, Number, rule
from data import scene_layouts
from eval import speed, zeroshot
from prod import app, search
from utils import ROOT, shorten

SHIPPED = 'configs/pretrain.yaml'
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
    assert [optim[k] for k in ('lr', 'min_lr', 'lr_decay_rate', 'warmup_steps', 'weight_decay')] == [
        5e-4, 1e-6, 0.9, 3000, 0.02]
    retrieval, caption = (read_yaml(ROOT / f'configs/{n}_flickr.yaml') for n in ('retrieval', 'caption'))
    assert retrieval['eval']['k_test'] == 128
    assert pretrain['teacher']['weights'].endswith('model_base_capfilt_large.pth')
    for config in (retrieval, caption):
        assert (config['optim']['lr'], config['optim']['weight_decay']) == (5e-5, 0.05)
        assert (config['model']['image_size'], config['train']['batch_size'], config['train']['epochs']) == (384, 32, 6)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / 'my.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path | str, *overrides: str, schema: str = 'configs/pretrain.yaml') -> str:
    """The one line that refuses a config."""
    with pytest.raises(ValueError) as error:
        load_config(path, schema, overrides)
    text = str(error.value)
    assert len(text) < 500 and len(text.splitlines()) == 1
    return text


def test_a_config_holds_only_what_differs(tmp_path):
    path = write(tmp_path, 'optim: {lr: 1.0e-4}\ntrain:\n  compile: yes\nloss:\n  ita: &w 2\n  itm: *w\n')
    config, shipped = (dict(flatten(c)) for c in (load_config(path, SHIPPED), read_yaml(ROOT / SHIPPED)))
    assert config == shipped | {'optim.lr': 1e-4, 'train.compile': True, 'loss.ita': 2.0, 'loss.itm': 2.0}
    assert load_config(write(tmp_path, path.read_text().encode('utf-16')), SHIPPED)['optim']['lr'] == 1e-4


def test_old_names_of_settings_are_understood_and_the_new_ones_said(tmp_path, caplog):
    path = write(tmp_path, 'optim: {decay: 0.5, accumulate: 2}\nteacher: {size: base}\ntrain: {wandb: mine}\n')
    config = load_config(path, SHIPPED, ['optim.decay=0.6', 'data.workers=0'])
    assert config == load_config(ROOT / SHIPPED, SHIPPED, [
        'optim.lr_decay_rate=0.6', 'optim.grad_accum_steps=2', 'train.wandb_project=mine', 'data.num_workers=0'])
    file, typed = caplog.messages
    assert file.endswith('my.yaml: old names of settings: optim.decay is now optim.lr_decay_rate; optim.accumulate is '
                         'now optim.grad_accum_steps; teacher.size is gone (nothing reads it); train.wandb is now '
                         'train.wandb_project')
    assert 'command line' in typed and 'data.workers is now data.num_workers' in typed
    assert "'optim.lr_decay_rate' is given twice" in refusal(write(tmp_path, 'optim: {decay: 1, lr_decay_rate: 1}'))
    assert 'my.yaml: optim.lr_decay_rate must be a number' in refusal(write(tmp_path, 'optim: {decay: x}'))


def test_every_old_name_has_a_new_one():
    keys = {key for schema in SCHEMAS for key, _ in flatten(read_yaml(ROOT / f'configs/{schema}.yaml'))}
    assert {new for new in RENAMED.values() if new} <= keys and not RENAMED.keys() & keys


def test_every_key_has_a_rule_of_its_kind():
    for schema in SCHEMAS:
        for key, value in flatten(read_yaml(ROOT / f'configs/{schema}.yaml')):
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert isinstance(rule(key), Number) and rule(key).whole == isinstance(value, int), key
            assert rule(key).read(value) == value


BOMB_FILE = ('a: &a [x, x, x, x]\n'
             + ''.join(f'{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n' for a, b in pairwise('abcdefghijk')))
MERGE_FILE = 'a: &a {k: 1}\n' + ''.join(f'{b}: &{b} {{<<: [*{a}, *{a}, *{a}]}}\n' for a, b in pairwise('abcdefghijk'))


@pytest.mark.parametrize('text, message', [
    ('ita: {queue_sise: 3}', "my.yaml: unknown key 'ita.queue_sise'; did you mean ita.queue_size"),
    ('lr: 3', "my.yaml: unknown key 'lr'; did you mean optim.lr"),
    ('ita: {queue_size: many}', "my.yaml: ita.queue_size must be a whole number from 0 to 100000000; got 'many'"),
    ('negative_all_rank: 1', 'my.yaml: negative_all_rank must be true or false; got 1'),
    ('optim:', "my.yaml: 'optim' is a section: give its settings, such as optim.lr; got None"),
    ('tokenizer: {}', 'tokenizer must be a string that is not empty; got {}'),
    ('tokenizer: 2020-01-01', 'tokenizer must be a string'), ('data: {train: {0..5}.tar}', 'not valid YAML: .*line 1'),
    ('optim.lr: 1\noptim: {lr: 1}', "'optim.lr' is given twice"), ('optim: {lr: 1, lr: 2}', 'duplicate key "lr"'),
    ('- a', "must hold a mapping of settings, got \\['a'\\]"), ('', 'mapping of settings, and is empty'),
    ('# nothing', 'mapping of settings, and is empty'), (bytes(range(256)), 'is no text in UTF-8'),
    ('optim: {lr: 1}'.encode('utf-16-le'), 'not valid YAML: unacceptable character'),
    (b'tokenizer: caf\xe9', 'is no text in UTF-8'), ('optim:\n\tlr: 1', 'not valid YAML: .*\\\\t.*line 2'),
    ('model: [', 'is not valid YAML'), ('--- 1\n--- 2', 'is not valid YAML'),
    ('!!python/name:os x', 'is not valid YAML'),
    ('train: {epochs: !!int ""}', 'is not valid YAML'), ('tokenizer: 2020-13-45', 'is not valid YAML: month'),
    ('train: {epochs: ' + '9' * 5000 + '}', 'not valid YAML'), ('train: {epochs: 0x' + 'f' * 50000 + '}', 'bits$'),
    (BOMB_FILE, 'more than 10,000 values, aliases written out'), (MERGE_FILE, 'more than 10,000 values'),
    ('tokenizer: &a [*a]', 'alias .* stands for nothing, or for itself'), ('[' * 10 ** 5, 'more than 20 levels deep'),
    ('\n'.join(f'k{i}: 1' for i in range(11_000)), 'more than 10,000 values'), ('1: 2', "unknown key '1'"),
    ('tokenizer: ' + 'x' * 8_000_000, 'too large for settings: 8,000,011 bytes'), ('? [a]\n: 1', 'unknown key')],
    ids=range(32))
def test_a_mistake_in_the_file_is_named(tmp_path, text, message):
    assert re.search(message, refusal(write(tmp_path, text)))


def test_a_path_that_is_no_file_is_named(tmp_path):
    assert 'is a folder: name a YAML file' in refusal(tmp_path)
    with pytest.raises(FileNotFoundError, match='no config file .*nowhere.yaml'):
        load_config(tmp_path / 'nowhere.yaml', SHIPPED)
    with pytest.raises(FileNotFoundError, match='model.size: no config file nowhere.yaml'):
        load_config(SHIPPED, SHIPPED, ['model.size=nowhere.yaml:small'])


@pytest.mark.parametrize('override, value', [
    ('optim.lr=1e-4', 1e-4), ('optim.lr=1', 1.0), ('teacher.weights=null', None), ('model.init=', None),
    ('train.epochs=2', 2), ('data.train=a/{0..5}.tar::b', 'a/{0..5}.tar::b'), ('data.train={0..5}.tar', '{0..5}.tar'),
    ('data.train="a b"', 'a b'), ('tokenizer=2020', '2020'), ('train.compile=on', True), ('train.compile=No', False),
    ('hidden_layers.text=[1, [2, 3]]', [1, [2, 3]]), ('hidden_layers.text=', None), ('train.keep_checkpoints=0', 0)])
def test_overrides(override, value):
    found = dict(flatten(load_config(ROOT / SHIPPED, SHIPPED, ['optim.lr=3', override])))[override.partition('=')[0]]
    assert found == value and type(found) is type(value)


def test_a_prompt_is_taken_as_it_stands():
    shipped = 'configs/caption_flickr.yaml'
    for text in ('', ' photo of ', 'null hypothesis: '):
        assert load_config(ROOT / shipped, shipped, [f'data.prompt={text}'])['data']['prompt'] == text
    assert load_config(ROOT / shipped, shipped, ['data.prompt="a b "'])['data']['prompt'] == 'a b '


@pytest.mark.parametrize('override, message', [
    ('optim.lrr=1', "unknown key 'optim.lrr'; did you mean optim.lr[?]"), ('optim.lr', 'form key=value'),
    ('=3', 'form key=value'), ('a..b=1', "unknown key 'a..b'"), ('optim.=1', 'unknown key'),
    ('optim.lr.x=1', 'did you mean optim.lr[?]'),
    ('loss=3', "'loss' is a section: give its settings, such as loss.ita"),
    ('loss={lm: 1}', 'is a section'), ('optim.lr={0..5}.tar', "'optim.lr' is not valid YAML"),
    ('optim.lr=1e-4x', "optim.lr must be a number from 0 to 100; got '1e-4x'"),
    ('optim.lr=', 'optim.lr must be a number'),
    ('optim.lr=true', 'optim.lr must be a number'), ('optim.lr=.nan', 'optim.lr must be a number'),
    ('optim.lr=&a [*a]', 'alias'), ('optim.lr=null', 'optim.lr must be a number'), ('train.compile=1', 'true or false'),
    ('train.epochs=3.0', 'train.epochs must be a whole number'), ('train.epochs="3"', 'must be a whole number'),
    ('train.epochs=1e30', 'must be a whole number'), ('train.batch_size=0', 'train.batch_size must be a whole number'),
    ('tokenizer=', "tokenizer must be a string that is not empty; got ''"), ('tokenizer=null', 'got None'),
    ('optim.lr_scheduler=bogus', "optim.lr_scheduler must be one of step, cosine; got 'bogus'"),
    ('train.precision=int8', 'must be one of bf16, fp32'), ('model.init_layers=null', 'one of spaced, first, last'),
    ('hidden_layers.vision=[true]', 'hidden_layers.vision must be null, layers'),
    ('hidden_layers.text=3', 'must be null'),
    ('optim.min_lr=1', 'command line: optim.min_lr must be at most optim.lr, 0.0005; got 1.0'),
    ('data.max_tokens=513', 'at most the text positions of model.size small, 512; got 513'),
    ('model.image_size=225', 'a multiple of the patch size of model.size small, 16; got 225'),
    ('model.size=huge', "model.size: unknown size 'huge'; .*has base, small"),
    ('x' * 10 ** 5 + '=1', 'unknown key'), ('optim.lr=' + 'x' * 10 ** 5, 'must be a number')])
def test_an_override_that_cannot_be_is_named(override, message):
    assert re.search(message, refusal(ROOT / SHIPPED, override))


def test_relations_of_the_caption_stage():
    caption = partial(refusal, ROOT / 'configs/caption_flickr.yaml', schema='configs/caption_flickr.yaml')
    assert 'eval.min_length must be at most eval.max_length, 30; got 31' in caption('eval.min_length=31')
    assert 'optim.min_lr must be at most scst.lr' in caption('scst.epochs=1', 'scst.lr=1e-7', 'optim.min_lr=1e-6')
    assert 'eval.max_length must be at most the text positions' in caption('eval.max_length=513')


NUMBERS = [(schema, key) for schema in SCHEMAS for key, value in flatten(read_yaml(ROOT / f'configs/{schema}.yaml'))
           if isinstance(rule(key), Number)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_number_out_of_range_is_one_line_that_names_its_key(data):
    schema, key = data.draw(st.sampled_from(NUMBERS))
    allowed = rule(key)
    wrong = data.draw(st.one_of(
        st.integers(max_value=int(allowed.low) - 1), st.integers(min_value=int(allowed.high) + 1),
        st.floats(max_value=allowed.low, exclude_max=not allowed.above, allow_nan=False),
        st.floats(min_value=allowed.high, exclude_min=True), st.just(float('nan')), st.booleans(), st.none(),
        st.floats().map(str), st.lists(st.integers()), *([st.floats(1, 9)] if allowed.whole else [])))
    with TemporaryDirectory() as folder:
        path = Path(folder, 'my.yaml')
        section, _, leaf = key.rpartition('.')
        YAML(typ='safe').dump({section: {leaf: wrong}}, path)
        assert f'my.yaml: {key} must be ' in refusal(path, schema=f'configs/{schema}.yaml')


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.text('{}[]&*!|>%@`"\'-:?,#= \n\ta1.~<'), st.binary()))
def test_any_file_is_a_config_or_one_line(content):
    with TemporaryDirectory() as folder:
        path = write(Path(folder), content.encode(errors='replace') if isinstance(content, str) else content)
        refusal(path)


@pytest.mark.parametrize('change, message', [
    ({'vision_heads': 5}, 'vision_width must be a multiple of vision_heads, 5; got 32'),
    ({'text_heads': 3}, 'text_width must be a multiple of text_heads, 3; got 32'),
    ({'vision_width': 30}, 'vision_width must be a multiple of 4'),
    ({'text_depth': 0}, 'text_depth must be a whole number'),
    ({'patch_size': 16.0}, 'patch_size must be a whole number'), ({'text_ffn': None}, 'text_ffn must be .*; got None'),
    ({'vision_dept': 3}, "unknown key 'vision_dept'; did you mean vision_depth"),
    ({'max_positions': True}, 'got True')])
def test_a_size_of_which_no_net_can_be_built_is_named(tmp_path, change, message):
    path = tmp_path / 'sizes.yaml'
    YAML(typ='safe').dump({'mine': read_yaml('tests/sizes.yaml')['nano'] | change, 'list': [1]}, path)
    with pytest.raises(ValueError, match=f'sizes.yaml: mine.*{message}'):
        read_size(f'{path}:mine')
    with pytest.raises(ValueError, match='list must be a mapping'):
        read_size(f'{path}:list')


def test_overrides_stand_anywhere_on_the_command_line():
    args, config = script_arguments('', SHIPPED, 'out', ['optim.lr=1', '--seed', '7', 'train.epochs=3'])
    assert (config['optim']['lr'], args.seed, config['train']['epochs']) == (1, 7, 3)


# Paths say where data and first weights lie (init_vision and init_text: the teacher's, which needs no download); sizes
# are of nets, pictures, crops, queues, batches, learning rates and lengths of training.
SIZES_AND_PATHS = {'model.size', 'model.image_size', 'model.init', 'model.init_vision', 'model.init_text',
                   'model.vit_ckpt_layer', 'tokenizer', 'teacher.weights', 'ita.queue_size',
                   'ita.momentum', 'ita.alpha_ramp_epochs', 'data.train', 'data.root', 'data.max_tokens',
                   'data.min_scale', 'data.num_workers', 'optim.lr', 'optim.warmup_steps', 'train.epochs',
                   'train.batch_size', 'train.log_every', 'train.save_every', 'scst.lr', 'eval.k_test'}


@pytest.mark.parametrize('name', SCHEMAS)
def test_the_demo_changes_sizes_and_paths_only(name):
    assert dict(flatten(read_yaml(ROOT / f'configs/demo/{name}.yaml'))).keys() <= SIZES_AND_PATHS


# ---------------------------------------------------------------- command lines, and what messages quote

TOOLS = {json_dataset: [], zeroshot: ['--checkpoint', 'x', '--root', 'x'], speed: ['--checkpoint', 'x'],
         prod.caption: ['x', '--weight', 'x', '--out', 'x.jsonl'], search: ['x', 'x', '--weight', 'x', '--index', 'x'],
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


@pytest.mark.parametrize('tool, option', [
    (pretrain_dlip, '--output_dir'), (json_dataset, '--out'), (scene_layouts, '--out'), (zeroshot, '--output_dir'),
    (prod.caption, '--out'), (search, '--index'), (search, '--sheet'), (app, '--index')])
def test_too_long_a_name_is_refused_by_its_option(tool, option, capsys):
    with pytest.raises(SystemExit):
        tool.main([option, f'{"n" * 300}.jsonl'])
    last = capsys.readouterr().err.splitlines()[-1]
    assert f'argument {option}: is a longer name than' in last and len(last) < 300


@pytest.mark.parametrize('setting, message', [
    ('data.train', 'no nnn.*: write it with json_dataset.py, or set data.train'), ('tokenizer', "no vocabulary 'nnn")])
def test_too_long_a_name_is_missing(setting, message, tmp_path, pretrained):
    with pytest.raises(FileNotFoundError, match=message):
        run(pretrain_dlip, pretrained[0], tmp_path, f'{setting}={"n" * 300}')
