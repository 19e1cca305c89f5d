"""Runs of the real scripts at nano size: resume, logs, bad input."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from processes import Python, python
from runs import broken_set, options, run, stop_in_step, write_config
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pretrain_dlip
import train_dlip_caption_flickr
import train_dlip_retrieval_flickr
from bench.stress import same
from models.blip import BLIP
from models.engine.dry_run import loading, too_short
from models.engine.launch import setup_process
from models.engine.logs import read_log
from models.engine.optim import learning_rate, parameter_groups, starts_pretrained
from models.weights.checkpoint import architecture, load_model, read_checkpoint
from utils import ROOT

pytestmark = pytest.mark.slow


def test_a_run_leaves_checkpoint_logs_and_curves(pretrained):
    _, out = pretrained
    rows = read_log(out / 'log.txt')
    assert [row['epoch'] for row in rows] == [0, 1]
    assert {'train_lr', 'train_loss_ita', 'train_loss_itm', 'train_loss_lm'} <= rows[0].keys()
    assert rows[1]['train_loss'] < rows[0]['train_loss']
    assert (out / 'curves.png').stat().st_size > 10_000
    model, tokenizer, info = load_model(out / 'last.pth')  # the file alone rebuilds the net
    assert not model.training and len(tokenizer) == model.config.vocab_size and info['config']['train']['epochs'] == 2
    assert not list(out.glob('*.tmp*'))


@pytest.mark.parametrize('stop_after', [1, 3, 9])
def test_a_stopped_run_resumes_bit_exactly(pretrained, tmp_path, monkeypatch, stop_after):
    """SIGTERM after some steps saves and exits with 0; the same command then ends where the unbroken run ended."""
    config, reference = pretrained
    steps = stop_in_step(monkeypatch, stop_after)
    with pytest.raises(SystemExit) as stop:
        run(pretrain_dlip, config, tmp_path)
    assert stop.value.code == 0 and len(steps) == stop_after
    got, want = run(pretrain_dlip, config, tmp_path), read_checkpoint(reference / 'last.pth')
    for part in ('model', 'objective', 'optimizer', 'epoch', 'batch'):
        assert same(got[part], want[part]), part

    def losses(folder):
        return [{k: v for k, v in row.items() if k.startswith('train_')} for row in read_log(folder / 'steps.txt')]
    assert losses(tmp_path) == losses(reference)


def test_a_failed_write_leaves_the_good_checkpoint(pretrained, tmp_path, monkeypatch):
    config, _ = pretrained
    before = run(pretrain_dlip, config, tmp_path, 'train.epochs=1')

    def torn(state, file):
        file.write(b'half a file')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', torn)
    with pytest.raises(OSError, match='No space left'):
        run(pretrain_dlip, config, tmp_path)
    assert same(read_checkpoint(tmp_path / 'last.pth')['model'], before['model'])
    assert not list(tmp_path.glob('*.tmp*'))


def test_an_epochs_last_update_may_be_smaller(pretrained, tmp_path):
    config, _ = pretrained
    state = run(pretrain_dlip, config, tmp_path, 'train.epochs=1', 'optim.grad_accum_steps=3')
    steps = {int(entry['step']) for entry in state['optimizer']['state'].values()}
    assert steps == {3}  # 7 batches of 8 pairs: after the 3rd, the 6th and the last


def test_the_path_from_pretraining_to_finetuned_students(pretrained, scenes, tmp_path, capsys):
    """Distil a pre-trained net into a smaller one, then finetune both ways; metrics, table and best.pth come out."""
    _, teacher = pretrained
    weights = {f'loss__{t}': 1.0 for t in ('image_feat', 'text_feat', 'fused_feat', 'decoder_feat', 'ita_soft',
                                          'itm_soft', 'lm_logits', 'self_attn', 'cross_attn', 'decoder_self_attn')}
    shared = {'teacher__weights': str(teacher / 'last.pth'), 'train__epochs': 1}
    config = write_config(tmp_path, 'pretrain', scenes, model__init_vision='teacher', model__init_text='teacher',
                          **shared, **weights)
    run(pretrain_dlip, config, tmp_path / 'student')
    init = {'model__init': str(tmp_path / 'student/last.pth'), 'train__epochs': 1}
    # the retrieval net that comes out of the first finetune has no decoder to caption with as the second one's teacher
    for script, name, key, weights, beside in (
            (train_dlip_retrieval_flickr, 'retrieval_flickr', 'test_txt_r1', teacher / 'last.pth', True),
            (train_dlip_caption_flickr, 'caption_flickr', 'test_CIDEr', tmp_path / 'retrieval_flickr/best.pth', False)):
        out = tmp_path / name
        config = write_config(tmp_path, name, scenes, **init, teacher__weights=str(weights))
        run(script, config, out, '--no_test')
        assert not (out / 'table.md').exists() and not any(key in row for row in read_log(out / 'log.txt'))
        run(script, config, out)
        assert ('BLIP has no column' in capsys.readouterr().out) != beside
        assert any(key in row for row in read_log(out / 'log.txt'))
        table = [line.split('|')[1:-1] for line in (out / 'table.md').read_text().splitlines()]
        assert [cell.strip() for cell in table[0]] == ['', 'DLIP', *['BLIP'] * beside]
        values = {line[0].strip(): line[1:] for line in table[2:]}
        assert {'train_lr', 'train_loss', key} <= values.keys() and not any(name.startswith('val') for name in values)
        assert all(float(cell) >= 0 for cell in values[key])
        assert load_model(out / 'best.pth')[0].config.task == name.split('_')[0]


def test_non_finite_loss_stops_and_names_the_component(pretrained, tmp_path, monkeypatch):
    config, _ = pretrained
    monkeypatch.setattr('models.losses.itm_loss', lambda logits: logits.sum() * float('nan'))
    with pytest.raises(FloatingPointError, match=r'loss\.itm is nan at step 0 \(captions \['):
        run(pretrain_dlip, config, tmp_path)


# ---------------------------------------------------------------- bad input

def test_bad_input_is_one_clear_line(pretrained, tmp_path):
    """The way a user meets it: exit code 1, one line, no traceback."""
    done = python('pretrain_dlip.py', *options(pretrained[0], tmp_path), 'data.train=nowhere/all.json')
    assert done.returncode == 1
    assert done.stderr.endswith('error: no nowhere/all.json: write it with json_dataset.py, or set data.train\n')
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('override, message', [
    ('teacher.weights=nowhere.pth', 'no checkpoint nowhere.pth'),
    ('model.init=nowhere.pth', 'no checkpoint nowhere.pth'),
    ('model.size=mikro', "model.size: unknown size 'mikro'"),
    ('model.init_text=teacher', 'teacher.weights is null'),
    ('train.batch_size=4096', 'lower train.batch_size'),
    ('train.precision=fp16', "train.precision must be one of bf16, fp32; got 'fp16'"),
    ('optim.lrr=1', 'did you mean optim.lr?'),
    ('tokenizer=no/such/vocab', "no vocabulary 'no/such/vocab'")])
def test_bad_settings(pretrained, tmp_path, override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        run(pretrain_dlip, pretrained[0], tmp_path, override)
    assert not (tmp_path / 'last.pth').exists()


def test_a_checkpoint_of_another_size_is_refused(pretrained, tmp_path):
    config, out = pretrained
    with pytest.raises(ValueError, match='does not fit .* misshaped .*Check model.size'):
        run(pretrain_dlip, config, tmp_path, f'model.init={out / "last.pth"}', 'model.size=mini_4')


def test_a_teacher_of_fewer_text_positions_is_refused(pretrained, tmp_path):
    teacher = ROOT / 'data/demo_teacher.pth'
    with pytest.raises(ValueError, match='data.max_tokens must be at most the text positions of the teacher .*, 32; '
                                         'got 33'):
        run(pretrain_dlip, pretrained[0], tmp_path, f'teacher.weights={teacher}', 'data.max_tokens=33')


def test_another_seed_does_not_continue_a_run(pretrained, tmp_path):
    config, _ = pretrained
    run(pretrain_dlip, config, tmp_path, 'train.epochs=1')
    with pytest.raises(ValueError, match='differs in the seed'):
        pretrain_dlip.main(['--config', str(config), '--output_dir', str(tmp_path), '--device', 'cpu', '--seed', '2'])


def test_no_permission_on_the_output_folder(pretrained, tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.raises(PermissionError, match='cannot write to the output folder .*--output_dir'):
        run(pretrain_dlip, pretrained[0], tmp_path / 'file')


def test_more_processes_than_gpus(pretrained, tmp_path, monkeypatch):
    for name, value in (('RANK', '0'), ('WORLD_SIZE', '3'), ('LOCAL_WORLD_SIZE', '3')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ValueError, match='3 processes were launched on this machine, which has 2 GPUs'):
        pretrain_dlip.main(['--config', str(pretrained[0]), '--output_dir', str(tmp_path), '--device', 'cuda'])


def test_a_gpu_is_set_by_its_number(monkeypatch):
    """As torch wants it, without torchrun too."""
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    assert [setup_process(name) for name in ('cuda', 'auto', 'cuda:1')] == chosen
    assert [device.index for device in chosen] == [0, 0, 1]


def test_an_empty_all_json(pretrained, scenes, tmp_path):
    empty = broken_set(scenes, tmp_path, list.clear)
    with pytest.raises(ValueError, match='holds no pair with a caption'):
        run(pretrain_dlip, pretrained[0], tmp_path / 'out', f'data.train={empty}')


def test_odd_captions_and_a_broken_picture_do_not_end_a_run(pretrained, scenes, tmp_path, capsys):
    def edit(records):
        records[0]['caption'] = ''
        records[1]['caption'] = 'word ' * 5000
        (tmp_path / 'cut.jpg').write_bytes(Path(records[2]['image_root']).read_bytes()[:300])
        records[2]['image_root'] = str(tmp_path / 'cut.jpg')
    data = broken_set(scenes, tmp_path, edit)
    run(pretrain_dlip, pretrained[0], tmp_path / 'out', f'data.train={data}')
    printed = capsys.readouterr().out
    assert 'cut.jpg is truncated or damaged' in printed and '1 pairs without a caption' in printed


def test_weight_decay_is_for_matrices_only(nano):
    decayed, spared = parameter_groups(nano, 0.1)
    assert (decayed['weight_decay'], spared['weight_decay']) == (0.1, 0.0)
    spared = {id(parameter) for parameter in spared['params']}
    layer = nano.text_encoder.layers[0]
    for parameter in (nano.temp, nano.visual_encoder.pos_embed, nano.visual_encoder.norm.weight, nano.itm_head.bias,
                      layer.output.LayerNorm.weight, nano.text_encoder.embeddings.position_embeddings.weight):
        assert id(parameter) in spared
    for parameter in (nano.itm_head.weight, layer.intermediate.dense.weight,
                      nano.visual_encoder.blocks[0].mlp.fc1.weight):
        assert id(parameter) not in spared


def test_published_weights_have_a_learning_rate_of_their_own(scenes, tmp_path):
    """`optim.pretrained_lr_scale` is for what init_vision and init_text filled, not for the layers that start fresh."""
    published = tmp_path / 'vision.safetensors'
    save_file(BLIP(architecture('tests/sizes.yaml:nano', 32, 100)).visual_encoder.state_dict(), published)
    config = write_config(tmp_path, 'pretrain', scenes, model__init_vision=str(published), train__epochs=1,
                          optim__pretrained_lr_scale=0.0, optim__weight_decay=0.0)
    run(pretrain_dlip, config, tmp_path / 'out')
    trained = load_model(tmp_path / 'out/last.pth')[0]
    start = load_file(published)
    assert all(torch.equal(weight, start[name]) for name, weight in trained.visual_encoder.state_dict().items()
               if name != 'pos_embed')
    settings = {'init': None, 'init_text': 'bert'}
    groups = parameter_groups(trained, 0.1, lambda name: starts_pretrained(f'student.{name}', settings))
    fresh = {id(parameter) for group in groups if not group['pretrained'] for parameter in group['params']}
    for name, parameter in trained.named_parameters():
        assert (id(parameter) in fresh) == (not name.startswith('text_') or 'crossattention' in name
                                            or name.startswith('text_proj.'))


def test_a_dry_run_warns_where_queue_and_momentum_do_not_fit_its_length():
    """The settings that bench/photos.md found to fail and to work, and the shipped ones with 5 M pairs."""
    def found(queue, momentum, pairs, updates, **model):
        config = {'ita': {'queue_size': queue, 'momentum': momentum}, 'model': {'init': None, **model}}
        return [warning.split()[0] for warning in too_short(config, pairs, updates)]
    assert found(1024, 0.95, 128, 100) == ['ita.queue_size']
    assert found(4096, 0.995, 256, 117) == ['ita.queue_size', 'ita.momentum']
    assert found(0, 0.9, 256, 117) == found(57600, 0.995, 1152, 86_000) == []
    assert found(1024, 0.99, 12, 1000, init_vision='teacher') == []


def test_a_dry_run_says_how_loading_keeps_up():
    assert loading(500, 900, 4, 16).endswith('enough')
    assert loading(500, 2400, 4, 16).endswith('set data.num_workers=6')
    assert 'needs 10 cores and there are 8: set data.num_workers=8, and keep copies of the images at 256' in loading(
        300, 2400, 4, 8)


def test_learning_rate_schedules():
    shared = dict(steps_per_epoch=10, epochs=4, lr=1.0, min_lr=0.1, warmup_steps=5, warmup_lr=0.0)
    step = [learning_rate(s, **shared, schedule='step', decay=0.5) for s in range(40)]
    assert step[0] == 0 and step[4] == 0.8 and step[5] == 1.0 and step[10] == 0.5 and step[39] == 0.125
    cosine = [learning_rate(s, **shared, schedule='cosine', decay=1.0) for s in range(41)]
    assert cosine[20] == pytest.approx(0.55) and cosine[40] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(cosine[5:], cosine[6:], strict=False))


def test_kill_during_training_loses_at_most_the_steps_since_the_last_save(pretrained, tmp_path):
    config, reference = pretrained
    victim = Python('pretrain_dlip.py', *options(config, tmp_path), 'train.save_every=1')
    deadline = time.monotonic() + 100
    while not (tmp_path / 'last.pth').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.kill()
    got = run(pretrain_dlip, config, tmp_path, 'train.save_every=1')
    assert same(got['model'], read_checkpoint(reference / 'last.pth')['model'])


def test_a_dry_run_measures_and_writes_nothing(pretrained, scenes, tmp_path, capsys, monkeypatch):
    config, _ = pretrained
    out = tmp_path / 'out'
    pretrain_dlip.main(['--config', str(config), '--output_dir', str(out), '--device', 'cpu', '--dry_run'])
    printed = capsys.readouterr().out
    for line in ('student 0.1M, momentum encoder', '8 x 1 processes = 8 pairs', '7 x 2 epochs = 14', 'GiB free',
                 'GiB kept for the backward pass of a batch'):
        assert line in printed
    assert re.search(r'the whole run +[\d.]+ hours .* on 1, 4 or 8 of this cpu [\d.]+, [\d.]+, [\d.]+', printed)
    assert re.search(r'loading +\d+ images/s a core x \d+ workers, training takes \d+: ', printed) and not out.exists()
    for script, name in ((train_dlip_retrieval_flickr, 'retrieval_flickr'),
                         (train_dlip_caption_flickr, 'caption_flickr')):
        path = write_config(tmp_path, name, scenes)
        script.main(['--config', str(path), '--output_dir', str(out), '--device', 'cpu', '--dry_run'])
        assert 'nothing was written' in capsys.readouterr().out and not out.exists()
    with pytest.raises(SystemExit):
        pretrain_dlip.main(['--config', str(config), '--store_teacher', '2', '--dry_run'])
    assert 'argument --dry_run: not allowed with argument --store_teacher' in capsys.readouterr().err
    monkeypatch.setattr('models.engine.dry_run.shutil.disk_usage',
                        lambda path: SimpleNamespace(total=2 ** 40, free=2 ** 10))
    with pytest.raises(ValueError, match='has 0.0 GiB free, the run needs .* lower train.keep_checkpoints'):
        pretrain_dlip.main(['--config', str(config), '--output_dir', str(out), '--device', 'cpu', '--dry_run'])


def test_a_run_can_be_watched(pretrained, tmp_path, monkeypatch):
    """TensorBoard has losses, system figures and captioned images; Weights & Biases has them, offline."""
    config, out = pretrained
    events = EventAccumulator(str(out / 'tensorboard'))
    events.Reload()
    assert {'train_loss_ita', 'train_lr', 'system_images_per_s', 'system_memory_GiB'} <= set(events.Tags()['scalars'])
    assert [event.step for event in events.Images('samples')] == [7, 14]
    assert Image.open(out / 'samples.png').width > 800
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    run(pretrain_dlip, config, tmp_path / 'out', 'train.epochs=1', 'train.wandb_project=dlip')
    written = list(tmp_path.glob('out/wandb/offline-run-*/*.wandb'))
    assert len(written) == 1 and written[0].stat().st_size > 10_000


