"""Checkpoints that are whole but odd: each loads and works, or is one line that names the file and what is wrong."""

import copy
import json
import math
import shutil
import time

import pytest
import torch
from conftest import NANO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from models.blip import BLIP, BLIPConfig
from models.weights.build import build_teacher
from models.weights.checkpoint import load_model, read_checkpoint, save_checkpoint
from models.weights.inherit import load_timm
from models.weights.sources import load_tokenizer
from models.weights.transformers_format import write_folder
from prod import DLIPProd

RUN = {'data': {'prompt': 'a picture of ', 'max_tokens': 9},
       'eval': {'num_beams': 2, 'max_length': 12, 'min_length': 5}}
IMAGE = Image.new('RGB', (9, 9), 'red')
WORDS, POSITIONS, BIAS = ('text_decoder.bert.embeddings.word_embeddings.weight', 'visual_encoder.pos_embed',
                          'visual_encoder.norm.bias')


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Nets this small only wait for a second one, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def whole(small_tokenizer, tmp_path_factory) -> dict:
    """What a sound checkpoint of a captioner holds."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('odd') / 'whole.pth'
    save_checkpoint(path, BLIP(BLIPConfig(**NANO, vocab_size=len(small_tokenizer), task='caption')), small_tokenizer,
                    RUN, metrics={'CIDEr': 90.5})
    return torch.load(path, weights_only=True)


def changed(content: dict, place: tuple[str, ...], value) -> dict:
    """A copy with one entry replaced."""
    content = copy.copy(content)
    content[place[0]] = changed(content[place[0]], place[1:], value) if len(place) > 1 else value
    return content


def serve(path) -> str:
    """A caption of what the file describes; or the message that it is refused with."""
    started = time.perf_counter()
    try:
        caption, = DLIPProd('caption', path).generate(IMAGE, num_beams=1)
    except (ValueError, FileNotFoundError) as error:  # the latter: of a file without a vocabulary
        message = str(error)
        assert str(path) in message and '\n' not in message and len(message) < len(str(path)) * 2 + 600, message
        caption = message
    assert time.perf_counter() - started < 30  # nothing is built for minutes
    return caption


def refused(path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve_strictly(path)
    serve(path)  # in one line that names the file


def serve_strictly(path) -> None:
    DLIPProd('caption', path)


# ---------------------------------------------------------------- claims and the tensors

@pytest.mark.parametrize('field, value, message', [
    ('text_depth', 100_000, 'says text_depth 100000, its tensors 2'), ('image_size', 80_000, 'says image_size 80000'),
    ('vision_depth', 10 ** 12, 'says vision_depth'), ('vocab_size', 10 ** 9, 'says vocab_size'),
    ('text_heads', 10 ** 9, 'not divisible by its 1000000000 heads'),
    ('vision_heads', 0, 'vision_heads must be a whole'),
    ('text_width', -32, 'text_width must be a whole'), ('patch_size', '16', "patch_size .* got '16'"),
    ('vision_depth', 2.0, 'vision_depth must be a whole'), ('vision_depth', True, 'vision_depth must be a whole'),
    ('vision_eps', math.nan, 'vision_eps must be a number'), ('vision_eps', 1e30, 'vision_eps must be a number'),
    ('dropout', -1, 'dropout must be'), ('task', ['caption'], 'unknown task'), ('task', 'retrieval', 'says task'),
    ('heads', 3, "unknown 'heads'")])
def test_an_architecture_that_its_tensors_deny_is_refused_at_once(whole, tmp_path, field, value, message):
    torch.save(changed(whole, ('architecture', field), value), tmp_path / 'odd.pth')
    refused(tmp_path / 'odd.pth', message)


@pytest.mark.parametrize('key, tensor, message', [
    (BIAS, torch.zeros(32, dtype=torch.int8), 'is of int8'), (BIAS, torch.zeros(32, dtype=torch.bool), 'is of bool'),
    (BIAS, torch.zeros(32, dtype=torch.complex64), 'is of complex64'),
    (BIAS, torch.zeros(32).to(torch.float8_e4m3fn), 'is of float8_e4m3fn'),
    (BIAS, torch.full((32,), 1e30), 'weights up to 1e[+]30'), (BIAS, torch.full((32,), -1e9), 'weights up to 1e[+]09'),
    (BIAS, torch.full((32,), math.inf), 'NaN or infinite'),
    (BIAS, torch.full((32,), 1e300, dtype=torch.float64), 'no usable net'),
    (BIAS, torch.zeros(32).to_sparse(), 'is sparse'), (BIAS, torch.zeros(32, device='meta'), 'is on the meta device'),
    (BIAS, torch.quantize_per_tensor(torch.zeros(32), 0.1, 0, torch.qint8), 'is quantised'),
    (BIAS, torch.zeros(0), 'misshaped'), (BIAS, 'zeros', 'holds str under'), (BIAS, None, 'holds NoneType under'),
    (WORDS, torch.zeros(1).expand(2 ** 31, 2 ** 20), 'claims more numbers than it holds'),
    (POSITIONS, torch.ones(1).expand(1, 10 ** 9, 32), 'claims more numbers than it holds'),
    (POSITIONS, torch.randn(1, 6, 32), 'make no square image'), (POSITIONS, torch.randn(5, 32), 'should have 3 axes'),
    (POSITIONS, torch.randn(1, 1, 32), 'make no square image'), (WORDS, torch.zeros(64, 32), 'is 0 throughout'),
    ('text_decoder.bert.encoder.layer.99999.output.dense.bias', torch.zeros(32), 'has only 3')])
def test_tensors_that_no_net_can_have_are_named(whole, tmp_path, key, tensor, message):
    if key == WORDS and tensor.shape == (64, 32):
        tensor = torch.zeros_like(whole['model'][WORDS])
    torch.save(changed(whole, ('model', key), tensor), tmp_path / 'odd.pth')
    refused(tmp_path / 'odd.pth', message)


@pytest.mark.parametrize('place, value, message', [
    (('format',), 'dlip-9', "of the format 'dlip-9'"), (('vocab',), 'abc', 'is no list of words'),
    (('vocab',), [1, 2], 'is no list of words'), (('vocab',), [], 'lacks'),
    (('vocab',), ['a', 'a'], 'the vocabulary of'),
    (('vocab',), ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '\ud800'], 'half characters'),
    (('config',), [1], 'config in .* is list'), (('config', 'data'), 5, 'config.data in .* is int'),
    (('config', 'data', 'prompt'), 5, 'data.prompt in'), (('config', 'data', 'max_tokens'), 'x', 'data.max_tokens in'),
    (('config', 'data', 'max_tokens'), 10 ** 9, 'data.max_tokens in'),
    (('config', 'eval', 'num_beams'), 0, 'eval.num_beams in'), (('metrics',), 'good', 'metrics in .* is str')])
def test_parts_of_the_wrong_kind_are_named(whole, tmp_path, place, value, message):
    torch.save(changed(whole, place, value), tmp_path / 'odd.pth')
    refused(tmp_path / 'odd.pth', message)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_strides_and_parameters_are_legitimate(whole, tmp_path, dtype):
    state = {key: torch.nn.Parameter(weight.to(dtype).t().contiguous().t() if weight.ndim == 2 else weight.to(dtype))
             for key, weight in whole['model'].items()}
    torch.save(changed(whole, ('model',), state), tmp_path / 'odd.pth')
    model = load_model(tmp_path / 'odd.pth')[0]
    for key, weight in model.state_dict().items():
        assert weight.dtype == torch.float32 and weight.is_contiguous()
        assert torch.equal(weight, whole['model'][key].to(dtype).float()), key


ODD = st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.integers(), st.floats(), st.text(max_size=5),
                st.sampled_from([[], {}, [[]], {'a': {}}, b'x', (), torch.zeros(2), torch.ones(3, dtype=torch.int8)]))


@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_any_part_may_be_anything(whole, tmp_path, data):
    """Of a part of the file, whatever lies in it, comes a caption or the one message."""
    place, node = [], whole
    while isinstance(node, dict) and (not place or data.draw(st.booleans())):
        place.append(data.draw(st.sampled_from(sorted(node))))
        node = node[place[-1]]
    torch.save(changed(whole, tuple(place), data.draw(ODD)), tmp_path / 'odd.pth')
    serve(tmp_path / 'odd.pth')


# ---------------------------------------------------------------- the named file

@pytest.fixture
def exported(small_tokenizer, tmp_path):
    """A folder of the transformers layout, and the net in it."""
    torch.manual_seed(1)
    model = BLIP(BLIPConfig(**NANO, vocab_size=len(small_tokenizer), task='caption')).eval()
    write_folder(tmp_path / 'A', model, small_tokenizer, {})
    return tmp_path / 'A', model


def test_the_named_file_is_loaded_and_no_other(exported):
    folder, model = exported
    with pytest.raises(FileNotFoundError, match='no checkpoint .*other.safetensors'):
        load_model(folder / 'other.safetensors')
    weights = load_file(folder / 'model.safetensors')
    key = 'vision_model.post_layernorm.bias'
    other = weights | {key: weights[key] + 1}
    save_file(other, folder / 'other.safetensors')
    torch.save(other, folder / 'another.bin')
    for name, shift in (('model.safetensors', 0), ('other.safetensors', 1), ('another.bin', 1)):
        got = load_model(folder / name)[0].visual_encoder.norm.bias
        assert torch.equal(got, model.visual_encoder.norm.bias + shift), name
    (folder / 'config.json').unlink()
    with pytest.raises(ValueError, match='other.safetensors holds no weights .* no config.json'):
        load_model(folder / 'other.safetensors')
    (folder.parent / 'run.pth').mkdir()
    with pytest.raises(FileNotFoundError, match='the folder .*run.pth has no config.json'):
        load_model(folder.parent / 'run.pth')


def test_weights_in_several_files(exported):
    folder, model = exported
    weights = load_file(folder / 'model.safetensors')
    names = [f'model-0000{i}-of-00002.safetensors' for i in (1, 2)]
    parts = {key: names[i % 2] for i, key in enumerate(weights)}
    for name in names:
        save_file({key: weight for key, weight in weights.items() if parts[key] == name}, folder / name)
    (folder / 'model.safetensors').unlink()
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': parts}))
    for source in (folder, index):
        assert torch.equal(load_model(source)[0].visual_encoder.norm.bias, model.visual_encoder.norm.bias)
    with pytest.raises(ValueError, match='is one of several files'):
        load_model(folder / names[0])
    for content in ('{', '[]', '{"weight_map": [1]}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match='index.json is no index of weights'):
            load_model(folder)


@pytest.mark.parametrize('content', ['[]', '{"model_type": "blip", "dlip": 3}', '[' * 100_000,
                                     '{"model_type": "blip", "vision_config": 5}',
                                     '{"model_type": "blip", "dlip": {"format": "dlip-folder-9"}}',
                                     '{"model_type": "blip", "dlip": {"temperature": "x"}}',
                                     '{"model_type": "blip", "text_config": {"num_hidden_layers": "two"}}'])
def test_an_odd_config_json_is_named(exported, content):
    folder, _ = exported
    (folder / 'config.json').write_text(content)
    with pytest.raises(ValueError, match=f'{folder}.config.json'):
        load_model(folder)


@pytest.mark.parametrize('name, content', [
    ('vocab.txt', b'\xff\xfe'), ('vocab.txt', b''), ('vocab.txt', b'[PAD]\n[PAD]\n'), ('tokenizer.json', b'{'),
    ('tokenizer.json', b'{"model": {"type": "BPE"}}')])
def test_a_broken_tokenizer_is_named(exported, name, content):
    folder, _ = exported
    (folder / 'vocab.txt').unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f'{name} is no tokenizer'):
        load_model(folder)
    with pytest.raises(ValueError, match=f'{name} is no tokenizer'):
        load_tokenizer(folder)


def test_overwriting_a_file_does_not_reach_what_was_loaded(whole, exported, small_tokenizer, tmp_path):
    path, (folder, _) = tmp_path / 'served.pth', exported
    torch.save(changed(whole, ('architecture', 'embed_dim'), 256), path)  # as the size nano
    teacher = build_teacher({'teacher': {'weights': str(path)}}, small_tokenizer, 'caption')
    nets = [load_model(path)[0], load_model(folder)[0], teacher]
    before = [{key: weight.clone() for key, weight in net.state_dict().items()} for net in nets]
    for file in (path, folder / 'model.safetensors'):
        with open(file, 'r+b') as opened:
            opened.write(bytes([66]) * file.stat().st_size)
            opened.truncate(100)
    for net, old in zip(nets, before, strict=True):
        assert all(torch.equal(weight, old[key]) for key, weight in net.state_dict().items())


def test_odd_tensors_do_not_start_a_tower_either(whole, tmp_path, nano):
    weights = {key.removeprefix('visual_encoder.'): weight for key, weight in whole['model'].items()
               if key.startswith('visual_encoder.')}
    for name, change, message in (('int', {'norm.bias': torch.zeros(32, dtype=torch.int8)}, 'is of int8'),
                                  ('inf', {'norm.bias': torch.full((32,), math.inf)}, 'infinite'),
                                  ('list', {'norm.bias': [1]}, 'holds list under'),
                                  ('big', {'pos_embed': torch.ones(1).expand(1, 10 ** 9, 32)}, 'claims more numbers')):
        torch.save(weights | change, tmp_path / f'{name}.pth')
        with pytest.raises(ValueError, match=f'{name}.pth.*{message}'):
            load_timm(nano, str(tmp_path / f'{name}.pth'))


def test_other_files_of_ours_are_no_checkpoints(whole, tmp_path):
    for name, content, message in (('empty', {}, 'holds no weights'), ('none', None, 'got NoneType'),
                                   ('no_model', {'vocab': []}, 'holds no weights'),
                                   ('no_net', {'model': {}}, 'nothing'), ('number', {'model': 5}, 'holds no weights'),
                                   ('keys', {'model': {5: 5}}, 'holds int')):
        torch.save(content, tmp_path / f'{name}.pth')
        with pytest.raises(ValueError, match=f'{name}.pth.*{message}'):
            read_checkpoint(tmp_path / f'{name}.pth')
    shutil.copy(__file__, tmp_path / 'text.pth')
    with pytest.raises(ValueError, match='text.pth holds no weights'):
        read_checkpoint(tmp_path / 'text.pth')
