"""Stopping a run anywhere and going on: signals, failing evaluations, NaN, changed settings."""

import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from processes import Python, python
from runs import options, run, run_on_two, write_config

import pretrain_dlip
import train_dlip_caption_flickr
import train_dlip_retrieval_flickr
from bench.stress import same
from configs.rules import RENAMED
from data.datasets import Captioned
from models.engine.logs import read_log
from models.weights.checkpoint import read_checkpoint
from utils import ROOT

pytestmark = pytest.mark.slow

PARTS = ('model', 'objective', 'optimizer', 'epoch', 'batch', 'best')


def at_call(monkeypatch, target: str, number: int, action) -> None:
    """Let `action()` happen before the `number`-th call of a function."""
    module, name = target.rsplit('.', 1)
    owner = sys.modules.get(module) or Captioned
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action()
        return original(*args, **kwargs)
    monkeypatch.setattr(owner, name, counted)


def terminate() -> None:
    """Twice, as the processes of torchrun hear a scheduler that signals all of them."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope='module')
def finetuned(scenes, tmp_path_factory):
    """(config, output folder) of an uninterrupted finetune with a self-critical stage."""
    folder = tmp_path_factory.mktemp('finetuned')
    config = write_config(folder, 'caption_flickr', scenes, train__batch_size=4, scst__epochs=1, scst__samples=2,
                          eval__max_length=10)
    run(train_dlip_caption_flickr, config, folder / 'out', '--no_test')
    return config, folder / 'out'


@pytest.mark.parametrize('place, number, epoch', [
    ('models.engine.optim.learning_rate', 1, None),  # the first step: nothing was done yet
    ('data.datasets.Captioned.__getitem__', 20, 0),  # loading the data
    ('train_dlip_caption_flickr.evaluate_captions', 1, 0),
    ('train_dlip_caption_flickr.evaluate_captions', 3, 1),  # two calls an epoch: beams and greedy
    ('models.engine.logger.plot_curves', 1, 0),  # between the log and the checkpoint
    ('models.engine.self_critical.generate_ids', 2, 2)])
def test_a_signal_anywhere_loses_nothing(finetuned, tmp_path, monkeypatch, place, number, epoch):
    config, reference = finetuned
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_call(patch, place, number, terminate)
        run(train_dlip_caption_flickr, config, tmp_path, '--no_test')
    assert stop.value.code == 0
    if epoch is None:
        assert not (tmp_path / 'last.pth').exists()
    else:
        assert read_checkpoint(tmp_path / 'last.pth')['epoch'] == epoch
    run(train_dlip_caption_flickr, config, tmp_path, '--no_test')
    for stage in ('.', 'scst'):
        got, want = (read_checkpoint(folder / stage / 'last.pth') for folder in (tmp_path, reference))
        assert [part for part in PARTS if not same(got[part], want[part])] == []
        assert read_log(tmp_path / stage / 'log.txt') == read_log(reference / stage / 'log.txt')


def test_torchrun_is_ended_within_the_step(pretrained, tmp_path):
    """Slow steps, nothing logged or saved on the way: the signal alone makes both processes save, at the same step."""
    config, _ = pretrained
    code, steps = tmp_path / 'slow.py', tmp_path / 'steps'
    code.write_text(f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
import pretrain_dlip
step = pretrain_dlip.train_step
def slow(*args):
    with open({str(steps)!r}, 'a') as file:
        file.write('.')
    time.sleep(1)
    return step(*args)
pretrain_dlip.train_step = slow
pretrain_dlip.main()
""")
    small = ('train.batch_size=4', 'train.log_every=100', 'train.save_every=0')
    command = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', code,
               *options(config, tmp_path), *small)
    job, deadline = Python(*command), time.monotonic() + 120
    while (not steps.exists() or steps.stat().st_size < 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGTERM)
    sent = time.monotonic()
    printed = job.wait()
    assert time.monotonic() - sent < 25, 'torchrun had to kill'
    state = read_checkpoint(tmp_path / 'last.pth')
    assert (state['epoch'], state['batch']) == (0, steps.stat().st_size // 2), printed
    assert 'Traceback' not in printed.stderr.replace('Traceback', '', 1)  # torchrun's own
    got, want = run_on_two(config, tmp_path, *small), run_on_two(config, tmp_path / 'unhurt', *small)
    assert [part for part in PARTS if not same(got[part], want[part])] == []


def test_ctrl_c_is_one_line(pretrained, tmp_path):
    config, _ = pretrained
    job = Python('pretrain_dlip.py', *options(config, tmp_path), 'train.epochs=1000')
    while not (tmp_path / 'steps.txt').exists():
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGINT)
    done = job.wait()
    assert done.returncode == 0 and 'Traceback' not in done.stderr


def test_a_failing_evaluation_is_done_again_alone(scenes, tmp_path, monkeypatch):
    """The epoch that it should have judged is kept."""
    config = write_config(tmp_path, 'retrieval_flickr', scenes)
    want = run(train_dlip_retrieval_flickr, config, tmp_path / 'unhurt', '--no_test')

    def fail():
        raise MemoryError('of the evaluation')
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        at_call(patch, 'train_dlip_retrieval_flickr.evaluate_retrieval', 2, fail)
        run(train_dlip_retrieval_flickr, config, tmp_path / 'out', '--no_test')
    steps = read_log(tmp_path / 'out/steps.txt')
    monkeypatch.setattr(train_dlip_retrieval_flickr, 'train_step', None)  # no step is made again
    got = run(train_dlip_retrieval_flickr, config, tmp_path / 'out', '--no_test')
    assert [part for part in PARTS if not same(got[part], want[part])] == []
    assert read_log(tmp_path / 'out/steps.txt') == steps
    assert read_log(tmp_path / 'out/log.txt') == read_log(tmp_path / 'unhurt/log.txt')


def test_what_the_evaluation_cannot_do_is_said_before_training(scenes, tmp_path):
    config = write_config(tmp_path, 'caption_flickr', scenes)
    with pytest.raises(ValueError, match=r'\(prompt and prefix\) < max_length'):
        run(train_dlip_caption_flickr, config, tmp_path / 'out', 'data.prompt=a picture of a picture of ',
            'eval.max_length=6', 'eval.min_length=0')
    assert not (tmp_path / 'out/steps.txt').exists()


# ---------------------------------------------------------------- NaN

def test_a_nan_is_never_saved(pretrained, tmp_path, monkeypatch):
    """Neither of a weight nor of the optimizer's state; what was saved before is kept."""
    config, _ = pretrained
    before = run(pretrain_dlip, config, tmp_path, 'train.epochs=1')
    for spoil in (lambda run: run.student.visual_encoder.cls_token.data.fill_(float('nan')),
                  lambda run: next(iter(run.optimizer.state.values()))['exp_avg'].fill_(float('inf'))):
        def spoiled(run, batches, spoil=spoil, train_step=pretrain_dlip.train_step):
            losses = train_step(run, batches)
            spoil(run)
            return {name: value for name, value in losses.items() if value.isfinite()}
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match='is not finite.* is not written'):
            patch.setattr(pretrain_dlip, 'train_step', spoiled)
            run(pretrain_dlip, config, tmp_path)
        assert same(read_checkpoint(tmp_path / 'last.pth')['model'], before['model'])


def test_a_checkpoint_that_holds_nan_is_passed_over(pretrained, tmp_path, capsys):
    config, reference = pretrained
    state = run(pretrain_dlip, config, tmp_path, 'train.epochs=1')
    state['model']['temp'].fill_(float('nan'))
    torch.save(state, tmp_path / 'spoilt')  # not in place: the file is mapped
    os.replace(tmp_path / 'spoilt', tmp_path / 'last.pth')
    got = run(pretrain_dlip, config, tmp_path)
    assert 'last.pth is not resumed: model.temp is not finite' in capsys.readouterr().out
    assert same(got['model'], read_checkpoint(reference / 'last.pth')['model'])


# ---------------------------------------------------------------- other settings

@pytest.fixture(scope='module')
def half(pretrained, tmp_path_factory):
    """Output folder of a run of one epoch, to be copied."""
    folder = tmp_path_factory.mktemp('half') / 'out'
    run(pretrain_dlip, pretrained[0], folder, 'train.epochs=1')
    return folder


def test_changed_settings_count_and_are_printed(pretrained, half, tmp_path, capsys):
    out = shutil.copytree(half, tmp_path / 'out')
    state = run(pretrain_dlip, pretrained[0], out, 'optim.weight_decay=0.5', 'loss.itm=0.5', 'train.epochs=2')
    decayed, spared = state['optimizer']['param_groups']
    assert (decayed['weight_decay'], spared['weight_decay']) == (0.5, 0.0)
    printed = capsys.readouterr().out
    for line in ('optim.weight_decay 0.02 -> 0.5', 'loss.itm 1.0 -> 0.5', 'train.epochs 1 -> 2'):
        assert f'last.pth: {line}\n' in printed
    assert printed.count('changed since') == 3


def test_a_run_of_a_version_with_other_names_of_settings_goes_on(pretrained, half, tmp_path, capsys):
    out = shutil.copytree(half, tmp_path / 'out')
    state = read_checkpoint(out / 'last.pth', mmap=False)
    for old, new in RENAMED.items():
        section, key = old.split('.')
        settings = state['config'][section]
        settings[key] = settings.pop(new.split('.')[1]) if new else 'nano'
    torch.save(state, out / 'last.pth')
    assert run(pretrain_dlip, pretrained[0], out, 'train.epochs=2')['epoch'] == 2
    printed = capsys.readouterr().out
    assert printed.count('changed since') == 1 and 'train.epochs 1 -> 2' in printed
    assert printed.count('optim.decay is now optim.lr_decay_rate') == 1


def test_a_run_of_a_version_with_other_names_of_projections_goes_on(pretrained, tmp_path):
    """`last.pth` of a version that called the projections to the teacher's width maps."""
    config, teacher = pretrained
    settings = [f'teacher.weights={teacher / "last.pth"}', 'loss.fused_feat=1.0', 'loss.vision_hidden=1.0']
    state = run(pretrain_dlip, config, tmp_path / 'out', *settings, 'train.epochs=1')
    names = {name: re.sub(r'^(token|fused|decoder)_proj', r'\1_map', name).replace('.projs.', '.maps.')
             for name in state['trained']}
    assert {'fused_map.weight', 'hidden.vision_hidden.maps.1_1.bias'} <= {*names.values()}
    old = state | {'objective': {names.get(name, name): value for name, value in state['objective'].items()},
                   'trained': [names[name] for name in state['trained']]}
    torch.save(old, tmp_path / 'old.pth')
    (tmp_path / 'old.pth').replace(tmp_path / 'out/last.pth')  # whose tensors are mapped
    assert run(pretrain_dlip, config, tmp_path / 'out', *settings)['epoch'] == 2


@pytest.mark.parametrize('overrides, named', [
    (['data.train=FEWER'], 'the number of training samples (58, now '),
    (['model.image_size=48'], 'image_size of the net (32, now 48)'),
    (['model.size=mini_4'], 'vision_width of the net (32, now 96)'),
    (['tokenizer=OTHER'], 'the vocabulary of the tokenizer'),
    (['ita.queue_size=30'], 'what it trains or keeps (momentum.id_queue'),
    (['loss.itm=0.0'], 'loss.itm 1.0 -> 0.0')])
def test_what_cannot_change_within_a_run_is_named(pretrained, half, scenes, tmp_path, overrides, named):
    records = json.loads((scenes / 'dataloader/all.json').read_text())
    (tmp_path / 'all.json').write_text(json.dumps(records[:40]))
    (tmp_path / 'vocab.txt').write_text((scenes / 'vocab.txt').read_text().replace('\nstar\n', '\nstarfish\n'))
    out = shutil.copytree(half, tmp_path / 'out')
    overrides = [text.replace('FEWER', str(tmp_path / 'all.json')).replace('OTHER', str(tmp_path / 'vocab.txt'))
                 for text in overrides]
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        run(pretrain_dlip, pretrained[0], out, *overrides)
    assert 'differs in' in str(error.value) and '\n' not in str(error.value)
    assert same(read_checkpoint(out / 'last.pth'), read_checkpoint(half / 'last.pth'))


def test_queues_without_the_teachers_features_are_not_used(pretrained, scenes, tmp_path, capsys):
    """They are noise beside the student's pairs, unless a term asked for those features."""
    config, teacher = pretrained
    settings = (f'teacher.weights={teacher / "last.pth"}',)
    next_stage = (*options(config, tmp_path / 'next'), *settings, 'loss.ita_soft=1.0', '--dry_run',
                  f'model.init={tmp_path / "out/last.pth"}')
    run(pretrain_dlip, config, tmp_path / 'out', *settings, 'train.epochs=1')
    pretrain_dlip.main(next_stage)
    assert 'they start random' in capsys.readouterr().out
    with pytest.raises(ValueError, match="differs in the queues of the teacher's features.*loss.ita_soft 0.0 -> 1.0"):
        run(pretrain_dlip, config, tmp_path / 'out', *settings, 'loss.ita_soft=1.0')
    run(pretrain_dlip, config, tmp_path / 'out', *settings, 'loss.image_feat=1.0')
    pretrain_dlip.main(next_stage)
    assert 'queues taken over (20' in capsys.readouterr().out
    other = shutil.copy(teacher / 'last.pth', tmp_path / 'other.pth')
    settings = (f'teacher.weights={teacher / "last.pth"}', 'loss.ita_soft=1.0')
    run(pretrain_dlip, config, tmp_path / 'soft', *settings, 'train.epochs=1')
    with pytest.raises(ValueError, match='differs in the teacher whose features its queues hold .*other.pth'):
        run(pretrain_dlip, config, tmp_path / 'soft', *settings, f'teacher.weights={other}')


def test_another_batch_size_goes_on_where_a_batch_of_it_ends(pretrained, tmp_path, monkeypatch):
    config, _ = pretrained
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_call(patch, 'models.engine.optim.learning_rate', 3, terminate)
        run(pretrain_dlip, config, tmp_path)
    assert read_checkpoint(tmp_path / 'last.pth')['batch'] == 3
    with pytest.raises(ValueError, match='train.batch_size 8 -> 16: the run stopped after 24 samples'):
        run(pretrain_dlip, config, tmp_path, 'train.batch_size=16')
    run(pretrain_dlip, config, tmp_path, 'train.batch_size=4')
    assert len(read_log(tmp_path / 'steps.txt')) == 3 + (14 - 6) + 14


def test_a_best_pth_is_no_run(finetuned, tmp_path):
    config, out = finetuned
    shutil.copy(out / 'best.pth', tmp_path / 'last.pth')
    done = python('train_dlip_caption_flickr.py', *options(config, tmp_path))
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'last.pth holds a net and not the state of a run' in done.stderr and 'model.init' in done.stderr


def test_a_log_that_a_crash_damaged_loses_those_lines_alone(pretrained, tmp_path):
    config, out = pretrained
    shutil.copytree(out, tmp_path / 'out')
    path = tmp_path / 'out/log.txt'
    path.write_bytes(path.read_bytes() + bytes(500) + b'\n{"epoch": 9\n\xff\n[1]\n{"cut')
    run(pretrain_dlip, config, tmp_path / 'out', 'train.epochs=3')
    assert [row['epoch'] for row in read_log(path)] == [0, 1, 2]


def test_gradient_norm_and_temperature_are_logged(pretrained):
    _, out = pretrained
    for name in ('steps.txt', 'log.txt'):
        for row in read_log(out / name):
            assert row['train_grad_norm'] > 0 and 0.001 <= row['train_temp'] <= 0.5
