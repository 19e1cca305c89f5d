"""Runs of the real scripts at nano size: resume, processes, logs, bad input."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from processes import Python, joined, python
from ruamel.yaml import YAML
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import json_dataset
import pretrain_dlip
import train_dlip_caption_flickr
import train_dlip_retrieval_flickr
from bench.stress import same, workers_of
from data import scene_layouts
from data.loader import Batches
from models.checkpoint import load_model, read_checkpoint
from models.logs import read_log
from models.optim import learning_rate, parameter_groups
from utils import ROOT, read_yaml


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> Path:
    """A small scene set with its all.json."""
    root = tmp_path_factory.mktemp('scenes') / 'data'
    scene_layouts.main(['--out', str(root), '--pretrain', '60', '--flickr_train', '8', '--flickr_val', '4',
                        '--flickr_test', '5', '--workers', '1'])
    json_dataset.main(['--root', str(root), '--out', str(root / 'dataloader'), '--workers', '1'])
    return root


def write_config(folder: Path, name: str, scenes: Path, **changes) -> Path:
    """A demo config at nano size without a teacher, on the small scene set; `changes` are dotted keys."""
    config = read_yaml(ROOT / f'configs/demo/{name}.yaml')
    settings = {'model.size': 'nano', 'model.image_size': 32, 'model.init': None, 'teacher.weights': None,
                'tokenizer': str(scenes / 'vocab.txt'), 'optim.warmup_steps': 2, 'train.batch_size': 8,
                'train.epochs': 2, 'train.precision': 'fp32', 'train.log_every': 1, 'train.save_every': 2}
    if name == 'pretrain':
        settings |= {'model.init_vision': None, 'model.init_text': None, 'ita.queue_size': 20,
                     'data.train': str(scenes / 'dataloader/all.json')}
    else:
        settings |= {'data.root': str(scenes / 'flickr30k')}
        config['loss'] = {key: float(key in ('ita', 'itm', 'lm')) for key in config['loss']}
    for key, value in (settings | {k.replace('__', '.'): v for k, v in changes.items()}).items():
        node = config
        *parents, leaf = key.split('.')
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    path = folder / f'{name}.yaml'
    YAML(typ='safe').dump(config, path)
    return path


def options(config: Path, out: Path) -> list[str]:
    return ['--config', str(config), '--output_dir', str(out), '--device', 'cpu', '--seed', '1']


def run(script, config: Path, out: Path, *overrides: str) -> dict:
    script.main([*options(config, out), *overrides])
    return read_checkpoint(out / 'last.pth')


@pytest.fixture(scope='session')
def pretrained(scenes, tmp_path_factory) -> tuple[Path, Path]:
    """(config, output folder) of an uninterrupted pre-training run."""
    folder = tmp_path_factory.mktemp('pretrain')
    config = write_config(folder, 'pretrain', scenes)
    run(pretrain_dlip, config, folder / 'out')
    return config, folder / 'out'


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


def stop_in_step(monkeypatch, number: int) -> list:
    """SIGTERM arrives in this step of a run; returns a list that grows by one a step."""
    steps = []

    def counted(*args, **kwargs):
        steps.append(args)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*args, **kwargs)
    monkeypatch.setattr('models.training.learning_rate', counted)
    return steps


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


def run_on_two(config: Path, out: Path, *overrides: str) -> dict:
    """`run` of `pretrain_dlip.py` on two processes."""
    for done in joined(2, 'pretrain_dlip.py', *options(config, out), *overrides):
        assert done.returncode == 0, done.stderr[-2000:]
    return read_checkpoint(out / 'last.pth') if '--store_teacher' not in overrides else {}


def test_two_processes_train_the_same_model_as_one(pretrained, tmp_path):
    """Same global batch, negatives over all ranks: equal up to the order of float sums (measured: 5e-6)."""
    config, _ = pretrained
    want = run(pretrain_dlip, config, tmp_path / 'one', 'train.epochs=1', 'negative_all_rank=true')
    got = run_on_two(config, tmp_path / 'two', 'train.epochs=1', 'negative_all_rank=true', 'train.batch_size=4')
    for part in ('model', 'objective'):  # weights; momentum twin and queues
        for key, value in want[part].items():
            assert torch.allclose(got[part][key].float(), value.float(), atol=1e-4), key
    one, two = (read_log(tmp_path / name / 'steps.txt') for name in ('one', 'two'))
    for name in ('train_loss_ita', 'train_loss_itm', 'train_loss_lm'):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-5), name


def test_accumulated_batches_train_the_same_model_as_one_large_batch(pretrained, scenes, tmp_path):
    """Every term but ITM, whose negatives are of their own micro-batch: ITA sees the columns of the whole update, token
    means are over all its tokens; also over two processes. Equal up to the order of float sums.
    """
    config, teacher = pretrained
    pairs = broken_set(scenes, tmp_path, lambda records: records.__delitem__(slice(48, None)))  # 6 updates of 8
    terms = ('ita_soft', 'image_feat', 'lm_logits', 'self_attn', 'decoder_self_attn')
    settings = [f'data.train={pairs}', 'train.epochs=1', 'loss.itm=0.0', 'ita.queue_size=30',
                f'teacher.weights={teacher / "last.pth"}', 'teacher.size=nano', *(f'loss.{term}=1.0' for term in terms)]
    want = run(pretrain_dlip, config, tmp_path / 'one', *settings)
    parts = [run(pretrain_dlip, config, tmp_path / 'four', *settings, 'train.batch_size=2', 'optim.accumulate=4'),
             run_on_two(config, tmp_path / 'both', *settings, 'train.batch_size=2', 'optim.accumulate=2')]
    for got in parts:
        assert {int(entry['step']) for entry in got['optimizer']['state'].values()} == {6}
        for part in ('model', 'objective'):  # weights; momentum twin and queues
            for key, value in want[part].items():
                assert torch.allclose(got[part][key].float(), value.float(), atol=1e-4), key
    one, *others = (read_log(tmp_path / name / 'log.txt')[0] for name in ('one', 'four', 'both'))
    for row in others:
        assert row == pytest.approx(one, rel=1e-5)


def test_an_epochs_last_update_may_be_smaller(pretrained, tmp_path):
    config, _ = pretrained
    state = run(pretrain_dlip, config, tmp_path, 'train.epochs=1', 'optim.accumulate=3')
    steps = {int(entry['step']) for entry in state['optimizer']['state'].values()}
    assert steps == {3}  # 7 batches of 8 pairs: after the 3rd, the 6th and the last


def test_the_path_from_pretraining_to_finetuned_students(pretrained, scenes, tmp_path, capsys):
    """Distil a pre-trained net into a smaller one, then finetune both ways; metrics, table and best.pth come out."""
    _, teacher = pretrained
    weights = {f'loss__{t}': 1.0 for t in ('image_feat', 'text_feat', 'fused_feat', 'decoder_feat', 'ita_soft',
                                          'itm_soft', 'lm_logits', 'self_attn', 'cross_attn', 'decoder_self_attn')}
    shared = {'teacher__weights': str(teacher / 'last.pth'), 'teacher__size': 'nano', 'train__epochs': 1}
    config = write_config(tmp_path, 'pretrain', scenes, model__init_vision='teacher', model__init_text='teacher',
                          **shared, **weights)
    run(pretrain_dlip, config, tmp_path / 'student')
    init = {'model__init': str(tmp_path / 'student/last.pth'), 'train__epochs': 1}
    # the retrieval net that comes out of the first finetune has no decoder to caption with as the second one's teacher
    for script, name, key, weights, beside in (
            (train_dlip_retrieval_flickr, 'retrieval_flickr', 'test_txt_r1', teacher / 'last.pth', True),
            (train_dlip_caption_flickr, 'caption_flickr', 'test_CIDEr', tmp_path / 'retrieval_flickr/best.pth', False)):
        out = tmp_path / name
        config = write_config(tmp_path, name, scenes, **init, teacher__size='nano', teacher__weights=str(weights))
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
    with pytest.raises(FloatingPointError, match=r'loss\.itm is nan at step 0 \(samples \['):
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
    ('model.size=mikro', "unknown model size 'mikro'"),
    ('model.init_text=teacher', 'teacher.weights is null'),
    ('train.batch_size=4096', 'lower train.batch_size'),
    ('train.precision=fp16', "unknown precision 'fp16': choose one of fp32, bf16"),
    ('optim.lrr=1', 'did you mean "optim.lr"'),
    ('tokenizer=no/such/vocab', "no vocabulary 'no/such/vocab'")])
def test_bad_settings(pretrained, tmp_path, override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        run(pretrain_dlip, pretrained[0], tmp_path, override)
    assert not (tmp_path / 'last.pth').exists()


def test_a_checkpoint_of_another_size_is_refused(pretrained, tmp_path):
    config, out = pretrained
    with pytest.raises(ValueError, match='does not fit .* misshaped .*Check model.size'):
        run(pretrain_dlip, config, tmp_path, f'model.init={out / "last.pth"}', 'model.size=micro')
    with pytest.raises(ValueError, match='not of teacher.size'):
        run(pretrain_dlip, config, tmp_path, f'teacher.weights={out / "last.pth"}', 'teacher.size=micro')


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
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ValueError, match='--nproc_per_node=3, but this machine has 2 GPUs'):
        pretrain_dlip.main(['--config', str(pretrained[0]), '--output_dir', str(tmp_path), '--device', 'cuda'])


def broken_set(scenes: Path, folder: Path, edit) -> Path:
    records = json.loads((scenes / 'dataloader/all.json').read_text())
    edit(records)
    (folder / 'all.json').write_text(json.dumps(records))
    return folder / 'all.json'


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
    assert 'cut.jpg is not a readable picture' in printed and '1 pairs without a caption' in printed


def test_all_processes_stop_when_one_meets_too_many_broken_pictures(pretrained, scenes, tmp_path):
    """None waits for ever for one that has stopped."""
    def edit(records):
        records *= 6
        (tmp_path / 'broken.jpg').write_bytes(b'')
        for row in sum(Batches(len(records), 8, seed=1, epoch=0, start_step=0, rank=1, world_size=2), []):
            records[row] = records[row] | {'image_root': str(tmp_path / 'broken.jpg')}
    data = broken_set(scenes, tmp_path, edit)
    runs = joined(2, 'pretrain_dlip.py', *options(pretrained[0], tmp_path), f'data.train={data}')
    stops = [re.findall('^error: .*', done.stderr, re.MULTILINE) for done in runs]
    assert stops[0] == stops[1] and 'not a picture) cannot be read' in stops[0][0], runs
    assert [done.returncode for done in runs] == [1, 1]
    assert ['broken.jpg' in done.stdout for done in runs] == [False, True]  # that it was met


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
    for line in ('student 0.1M, momentum twin', '8 x 1 processes = 8 pairs', '7 x 2 epochs = 14', 'GiB free',
                 'GiB kept for the backward pass of a batch'):
        assert line in printed
    assert re.search(r'the whole run +[\d.]+ hours', printed) and not list(out.iterdir())
    for script, name in ((train_dlip_retrieval_flickr, 'retrieval_flickr'),
                         (train_dlip_caption_flickr, 'caption_flickr')):
        path = write_config(tmp_path, name, scenes)
        script.main(['--config', str(path), '--output_dir', str(out), '--device', 'cpu', '--dry_run'])
        assert 'nothing was written' in capsys.readouterr().out and not list(out.iterdir())
    monkeypatch.setattr('models.rehearsal.shutil.disk_usage', lambda path: SimpleNamespace(free=2 ** 10))
    with pytest.raises(ValueError, match='has 0.0 GiB free, the run needs .* lower train.keep'):
        pretrain_dlip.main(['--config', str(config), '--output_dir', str(out), '--device', 'cpu', '--dry_run'])


def test_a_run_can_be_watched(pretrained, tmp_path, monkeypatch):
    """TensorBoard has losses, system figures and captioned pictures; Weights & Biases has them, offline."""
    config, out = pretrained
    events = EventAccumulator(str(out / 'tensorboard'))
    events.Reload()
    assert {'train_loss_ita', 'train_lr', 'system_images_per_s', 'system_memory_GiB'} <= set(events.Tags()['scalars'])
    assert [event.step for event in events.Images('samples')] == [7, 14]
    assert Image.open(out / 'samples.png').width > 800
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    run(pretrain_dlip, config, tmp_path / 'out', 'train.epochs=1', 'train.wandb=dlip')
    written = list(tmp_path.glob('out/wandb/offline-run-*/*.wandb'))
    assert len(written) == 1 and written[0].stat().st_size > 10_000


def node(config: Path, out: Path, port: int, *overrides: str) -> Python:
    """One node's launch of two, as the README has it, with one process."""
    return Python('-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--max-restarts=3',
                  '--rdzv_backend=c10d', f'--rdzv_endpoint=localhost:{port}', '--rdzv_id=dlip',
                  '--rdzv_conf=keep_alive_interval=1', 'pretrain_dlip.py', *options(config, out), *overrides,
                  TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')


def test_two_nodes_one_of_which_dies_and_comes_back(pretrained, tmp_path):
    config, _ = pretrained
    small = ('train.batch_size=4', 'train.epochs=6', 'train.save_every=1')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    out = tmp_path / 'out'
    first, deadline = node(config, out, port, *small), time.monotonic() + 120
    while socket.socket().connect_ex(('localhost', port)) and time.monotonic() < deadline:
        time.sleep(0.1)  # the first node holds the rendezvous, so it must be the one that stays
    second = node(config, out, port, *small)
    while len(read_log(out / 'steps.txt')) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in (second.pid, *workers_of(second.pid)):
        os.kill(process, signal.SIGKILL)
    second.kill()
    second = node(config, out, port, *small)
    for process in (first, second):
        done = process.wait(timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    got, want = read_checkpoint(out / 'last.pth'), run_on_two(config, tmp_path / 'unhurt', *small)
    for part in ('model', 'objective', 'optimizer'):
        assert same(got[part], want[part]), part


def test_processes_exchange_gradients_once_an_update_and_agree_on_everything(pretrained, tmp_path):
    """Weights, twin and queues are the same to the bit on both; buffers are not broadcast, no parameter is unused."""
    config, _ = pretrained
    code = tmp_path / 'watched.py'
    code.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, pretrain_dlip
from torch.nn.parallel import DistributedDataParallel as Parallel
from models.training import Run
alone, quiet, end_epoch = [], Parallel.no_sync, Run.end_epoch
Parallel.no_sync = lambda self: alone.append(1) or quiet(self)
def watched(self, *args):
    net = self.parallel
    settings = net.find_unused_parameters, net.gradient_as_bucket_view, net.will_sync_module_buffers()
    torch.save([self.objective.state_dict(), settings, len(alone)], {str(tmp_path)!r} + f'/rank{{os.environ["RANK"]}}')
    end_epoch(self, *args)
Run.end_epoch = watched
pretrain_dlip.main()
""")
    for done in joined(2, code, *options(config, tmp_path / 'out'), 'train.epochs=1', 'train.batch_size=4',
                      'optim.accumulate=2'):
        assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f'rank{rank}') for rank in (0, 1))
    assert same(first[0], second[0]) and 'momentum.image_queue' in first[0]
    assert first[1] == (False, True, False)
    assert first[2] == 3  # 7 batches of each process are 3 updates of two and one of one


def test_a_failure_on_any_rank_ends_the_job_with_its_traceback(pretrained, tmp_path):
    config, _ = pretrained
    code = (tmp_path / 'broken.py')
    code.write_text(f'import sys\nsys.path.insert(0, {str(ROOT)!r})\n'
                    'import os\nimport models.losses, pretrain_dlip\n'
                    'if os.environ["RANK"] == "1":\n    models.losses.itm_loss = None\n'
                    'pretrain_dlip.main()\n')
    done = python('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', code,
                  *options(config, tmp_path / 'out'))
    assert done.returncode and "TypeError: 'NoneType' object is not callable" in done.stderr
    assert '[rank1]' in done.stderr
