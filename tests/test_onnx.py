"""A net as ONNX graphs: what torch gives, at sizes of all kinds; weights once; faults."""

import json
import shutil
import signal
import time

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import Python

from data.json_lines import JsonLines
from models.weights.checkpoint import load_model
from prod import DLIPProd
from prod import export as export_tool
from prod.images import find_images
from prod.onnx_export import export_onnx
from utils import ROOT, explanation

pytestmark = pytest.mark.slow

TEACHER = ROOT / 'data/demo_teacher.pth'


@pytest.fixture(scope='module')
def graphs(folder, tmp_path_factory):
    """Folder of the graphs of a random net that does both tasks."""
    target = tmp_path_factory.mktemp('onnx') / 'graphs'
    export_tool.main([str(folder / 'save/last.pth'), str(target), '--format', 'onnx'])
    return target


@pytest.fixture(scope='module')
def pair(folder, graphs):
    return DLIPProd(None, folder / 'save/last.pth'), DLIPProd(None, graphs, backend='onnx')


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3),
       st.lists(st.text('abc xyz', max_size=30), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3),
       st.integers(9, 14))
def test_graphs_give_what_torch_gives(pair, sizes, texts, beams, batch_size, length):
    ours, theirs = pair
    noise = np.random.default_rng(len(texts))
    images = [Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    for name, inputs in (('get_image_feat', (images,)), ('get_text_feat', (texts,)), ('match', (images, texts)),
                         ('caption_scores', (images, texts))):
        mine, other = (getattr(dlip, name)(*inputs, batch_size=batch_size) for dlip in (ours, theirs))
        assert torch.allclose(mine, other, atol=1e-5), name
    mine, other = (dlip.generate(images, num_beams=beams, num_captions=beams, max_length=length, min_length=5,
                                 batch_size=batch_size, no_repeat_ngram_size=2, forbid=['dog'], prefix='a red'[:beams],
                                 scores=True) for dlip in (ours, theirs))
    flat = [[pair for image in said for pair in (image if beams > 1 else [image])] for said in (mine, other)]
    assert [text for text, _ in flat[0]] == [text for text, _ in flat[1]]
    assert torch.allclose(*(torch.tensor([score for _, score in each]) for each in flat), atol=1e-5)


def test_weights_are_there_once_and_a_browser_has_the_operators(pair, graphs):
    held = sum(weight.numel() * 4 for weight in pair[0].net.parameters())
    tensors = sum(1 for weight in pair[0].net.parameters() if weight.numel() * 4 >= 1024)
    assert 0.9 * held < (graphs / 'weights.bin').stat().st_size < held + 4096 * tensors
    for path in graphs.glob('*.onnx'):
        graph = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path))
        assert [(entry.domain, entry.version) for entry in graph.opset_import] == [('', 17)]
        assert all(tensor.data_location == tensor.EXTERNAL for tensor in graph.graph.initializer
                   if np.prod(tensor.dims) * 4 >= 1024)
        assert path.stat().st_size < 400_000
    assert json.loads((graphs / 'config.json').read_text())['fingerprint'] == pair[0].fingerprint == pair[1].fingerprint


def test_a_captioners_graphs(folder, tmp_path):
    net, tokenizer, info = load_model(folder / 'save/dlip_caption_flickr.pth')
    export_onnx(tmp_path, net, tokenizer, info)
    assert not any(part.training for part in net.modules())
    assert {path.stem for path in tmp_path.glob('*.onnx')} == {'image_encoder', 'keys_values', 'prefill', 'step'}
    captioner = DLIPProd('caption', tmp_path, backend='onnx')
    assert captioner.generate(Image.new('L', (9, 9)))
    with pytest.raises(ValueError, match='is a caption checkpoint without the text_encoder'):
        captioner.get_text_feat('a dog')
    with pytest.raises(ValueError, match='holds graphs: save the checkpoint'):
        captioner.save_pretrained(tmp_path / 'x')


@pytest.mark.parametrize('precision, task, size', [('fp16', 'retrieval', 0.53), ('int8', 'caption', 0.30)])
def test_smaller_weights_keep_what_a_trained_net_says(tmp_path, precision, task, size):
    export_tool.main([str(TEACHER), str(tmp_path), '--task', task, '--format', 'onnx', '--precision', precision])
    exact, small = DLIPProd(task, TEACHER), DLIPProd(task, tmp_path, backend='onnx', precision=precision)
    held = sum(weight.numel() * 4 for weight in load_model(TEACHER, task=task)[0].parameters())
    assert (tmp_path / 'weights.bin').stat().st_size < size * held
    images = find_images(ROOT / 'prod/examples')
    if task == 'caption':
        assert sum(a == b for a, b in zip(exact.generate(images), small.generate(images), strict=True)) >= 10
    else:
        assert torch.allclose(exact.get_image_feat(images), small.get_image_feat(images), atol=1e-3)
    with pytest.raises(ValueError, match='was exported with --precision .*, not bf16'):
        DLIPProd(None, tmp_path, backend='onnx', precision='bf16')


def test_what_is_no_folder_of_graphs(folder, graphs, tmp_path):
    with pytest.raises(FileNotFoundError, match='is no folder of ONNX graphs: write one by python prod/export.py'):
        DLIPProd(None, folder / 'save/last.pth', backend='onnx')
    for text in ('{', '[]', '{"format": "dlip-onnx-0"}', '{"format": "dlip-onnx-1", "architecture": {"a": 1}}'):
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(ValueError, match='describes no ONNX graphs of this version'):
            DLIPProd(None, tmp_path, backend='onnx')
    for path in graphs.iterdir():
        if path.name != 'weights.bin':
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'weights.bin').write_bytes((graphs / 'weights.bin').read_bytes()[:9999])
    with pytest.raises(ValueError, match='image_encoder.onnx cannot be loaded') as caught:
        DLIPProd(None, tmp_path, backend='onnx').get_image_feat(Image.new('L', (9, 9)))
    assert '\n' not in explanation(caught.value)
    with JsonLines(tmp_path / 'busy').writing(), pytest.raises(ValueError, match='another process is writing .*busy'):
        export_tool.main([str(folder / 'save/last.pth'), str(tmp_path / 'busy'), '--format', 'onnx'])
    with pytest.raises(ValueError, match='--precision int8 needs --format onnx'):
        export_tool.main([str(folder / 'save/last.pth'), str(tmp_path / 'x.pth'), '--precision', 'int8'])


def test_an_export_that_is_stopped_leaves_no_folder_of_graphs(folder, graphs, tmp_path):
    target = tmp_path / 'graphs'
    command = ['-m', 'prod.export', folder / 'save/last.pth', target, '--format', 'onnx']
    shutil.copytree(graphs, target)
    process = Python(*command)
    while (target / 'config.json').exists():
        time.sleep(0.01)
    process.process.terminate()
    stopped = process.wait()
    assert stopped.returncode == 128 + signal.SIGTERM and stopped.stderr.count('\n') == 1, stopped.stderr
    assert not list(target.glob('*.tmp*'))
    with pytest.raises(FileNotFoundError, match='is no folder of ONNX graphs'):
        DLIPProd(None, target, backend='onnx')
