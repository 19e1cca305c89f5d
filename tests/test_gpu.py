"""What only a GPU can show; skipped where there is none."""

import pytest
import torch
from runs import options, write_config

import pretrain_dlip
import train_dlip_caption_flickr
import train_dlip_retrieval_flickr
from data.datasets import ImageTextEval
from data.transforms import EvalTransform
from eval.retrieval import retrieval_scores
from models.distill.terms import TERMS
from models.engine.logs import read_log
from models.weights.checkpoint import load_model, read_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
SCRIPTS = {'pretrain': pretrain_dlip, 'retrieval_flickr': train_dlip_retrieval_flickr,
           'caption_flickr': train_dlip_caption_flickr}


def train(name, config, out, device, *overrides):
    SCRIPTS[name].main([*options(config, out, device), *overrides])
    return read_log(out / 'steps.txt')


@pytest.fixture(scope='module')
def teacher(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    train('pretrain', write_config(folder, 'pretrain', scenes, train__epochs=1), folder, 'cuda')
    return folder / 'last.pth'


@pytest.fixture
def distilled(scenes, teacher, tmp_path):
    """A pre-training with every term."""
    terms = {f'loss__{term}': 1.0 for term in TERMS}
    return write_config(tmp_path, 'pretrain', scenes, teacher__weights=str(teacher),
                        model__dropout=0.0, data__randaugment=False, train__epochs=1, **terms)


def test_a_gpu_trains_as_the_cpu_does(distilled, tmp_path):
    on_cpu, on_gpu = (train('pretrain', distilled, tmp_path / device, device) for device in ('cpu', 'cuda'))
    assert len(on_cpu) == len(on_gpu) > 3
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu == pytest.approx(cpu, rel=0.03, abs=0.003)


@pytest.mark.parametrize('compiled', ['false', 'true'])
def test_bf16_learns_what_fp32_does(distilled, tmp_path, compiled):
    exact = train('pretrain', distilled, tmp_path / 'fp32', 'cuda')
    rough = train('pretrain', distilled, tmp_path / 'bf16', 'cuda', 'train.precision=bf16', f'train.compile={compiled}')
    assert [step['train_loss'] for step in rough] == pytest.approx([step['train_loss'] for step in exact], rel=0.05)


def test_no_step_waits_for_the_gpu(distilled, tmp_path, monkeypatch):
    """Forward, backward and update are handed over without looking at a result, so that the next batch is prepared
    meanwhile."""
    def watched(method):
        def run(*args):
            torch.cuda.set_sync_debug_mode('error')
            try:
                return method(*args)
            finally:
                torch.cuda.set_sync_debug_mode('default')
        return run
    monkeypatch.setattr(pretrain_dlip, 'train_step', watched(pretrain_dlip.train_step))
    train('pretrain', distilled, tmp_path / 'out', 'cuda', 'train.log_every=100', 'train.precision=bf16')


def test_stored_targets_teach_the_same(distilled, tmp_path):
    folder = f'teacher.cache={tmp_path / "targets"}'
    terms = 'loss.vision_hidden=0', 'loss.text_hidden=0', 'loss.fused_hidden=0', 'loss.decoder_hidden=0', \
        'loss.itm_soft=0', 'teacher.top_k=1000'
    live = train('pretrain', distilled, tmp_path / 'live', 'cuda', *terms)
    pretrain_dlip.main([*options(distilled, tmp_path / 'store', 'cuda'), '--store_teacher', '1', folder, *terms])
    stored = train('pretrain', distilled, tmp_path / 'stored', 'cuda', folder, *terms)
    assert [step['train_loss'] for step in stored] == pytest.approx([step['train_loss'] for step in live], rel=0.02)


@pytest.mark.parametrize('name', ['retrieval_flickr', 'caption_flickr'])
def test_finetunes_resume_and_their_checkpoints_serve_a_cpu(scenes, teacher, tmp_path, name):
    config = write_config(tmp_path, name, scenes, model__init=str(teacher), train__precision='bf16',
                          train__compile=True)
    train(name, config, tmp_path / 'out', 'cuda', 'train.epochs=1')
    steps = train(name, config, tmp_path / 'out', 'cuda', 'train.epochs=2')
    assert read_checkpoint(tmp_path / 'out/last.pth')['epoch'] == 2 and steps[-1]['epoch'] == 1
    assert load_model(tmp_path / 'out/best.pth')[0].device.type == 'cpu'


def test_retrieval_scores_equal_those_of_the_cpu(scenes, teacher):
    net, tokenizer, _ = load_model(teacher)
    pictures = ImageTextEval(scenes / 'flickr30k', 'test', EvalTransform(net.config.image_size), 30)
    on_cpu = retrieval_scores(net, tokenizer, pictures)
    on_gpu = retrieval_scores(net.to('cuda'), tokenizer, pictures, device='cuda')
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=0, atol=0.01)
