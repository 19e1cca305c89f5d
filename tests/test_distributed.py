"""Several processes, nodes and accumulated batches train as one process does, and end together."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from processes import Python, joined, python
from runs import broken_set, options, read_losses, run, run_on, run_on_two
from torch.distributed.elastic.utils.distributed import get_free_port

import pretrain_dlip
from bench.stress import same, workers_of
from data.loader import DistributedBatchSampler
from models.engine.logs import read_log
from models.weights.checkpoint import read_checkpoint
from utils import ROOT

pytestmark = pytest.mark.slow


def test_several_processes_train_the_same_model_as_one(pretrained, tmp_path):
    """Same global batch, negatives over all ranks: equal up to the order of float sums (measured: 5e-6); four of them
    share the optimizer's state."""
    config, _ = pretrained
    settings = 'train.epochs=1', 'negative_all_rank=true', 'model.dropout=0.0'
    want = run(pretrain_dlip, config, tmp_path / 'one', *settings)
    runs = {'two': run_on_two(config, tmp_path / 'two', *settings, 'train.batch_size=4'),
            'four': run_on(4, config, tmp_path / 'four', *settings, 'train.batch_size=2', 'optim.shard=true')}
    one = read_log(tmp_path / 'one/steps.txt')
    for folder, got in runs.items():
        for part in ('model', 'objective'):  # weights; momentum encoder and queues
            for key, value in want[part].items():
                assert torch.allclose(got[part][key].float(), value.float(), atol=1e-4), (folder, key)
        rows = read_log(tmp_path / folder / 'steps.txt')
        for name in ('train_loss_ita', 'train_loss_itm', 'train_loss_lm'):
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in one], rel=1e-5), (folder, name)


def test_accumulated_batches_train_the_same_model_as_one_large_batch(pretrained, scenes, tmp_path):
    """Every term but ITM, whose negatives are of their own micro-batch: ITA sees the columns of the whole update, token
    means are over all its tokens; also over two processes. Equal up to the order of float sums.
    """
    config, teacher = pretrained
    pairs = broken_set(scenes, tmp_path, lambda records: records.__delitem__(slice(48, None)))  # 6 updates of 8
    terms = ('ita_soft', 'image_feat', 'lm_logits', 'self_attn', 'decoder_self_attn')
    settings = [f'data.train={pairs}', 'train.epochs=1', 'loss.itm=0.0', 'loss.itm_soft=0.0', 'ita.queue_size=30',
                'model.dropout=0.0', f'teacher.weights={teacher / "last.pth"}',
                *(f'loss.{term}=1.0' for term in terms)]
    want = run(pretrain_dlip, config, tmp_path / 'one', *settings)
    parts = [run(pretrain_dlip, config, tmp_path / 'four', *settings, 'train.batch_size=2', 'optim.grad_accum_steps=4'),
             run_on_two(config, tmp_path / 'both', *settings, 'train.batch_size=2', 'optim.grad_accum_steps=2')]
    for got in parts:
        assert {int(entry['step']) for entry in got['optimizer']['state'].values()} == {6}
        for part in ('model', 'objective'):  # weights; momentum encoder and queues
            for key, value in want[part].items():
                assert torch.allclose(got[part][key].float(), value.float(), atol=1e-4), key
    one, *others = (read_losses(tmp_path / name / 'log.txt')[0] for name in ('one', 'four', 'both'))
    for row in others:
        assert row == pytest.approx(one, rel=1e-5)


def test_all_processes_stop_when_one_meets_too_many_broken_pictures(pretrained, scenes, tmp_path):
    """None waits for ever for one that has stopped."""
    def edit(records):
        records *= 6
        (tmp_path / 'broken.jpg').write_bytes(b'')
        sampler = DistributedBatchSampler(len(records), 8, seed=1, epoch=0, start_batch=0, rank=1, world_size=2)
        for row in sum(sampler, []):
            records[row] = records[row] | {'image_root': str(tmp_path / 'broken.jpg')}
    data = broken_set(scenes, tmp_path, edit)
    runs = joined(2, 'pretrain_dlip.py', *options(pretrained[0], tmp_path), f'data.train={data}')
    stops = [re.findall('^error: .*', done.stderr, re.MULTILINE) for done in runs]
    assert stops[0] == stops[1] and 'not an image) cannot be read' in stops[0][0], runs
    assert [done.returncode for done in runs] == [1, 1]
    assert ['broken.jpg' in done.stdout for done in runs] == [False, True]  # that it was met


def node(config: Path, out: Path, port: int, *overrides: str) -> Python:
    """One node's launch of two, as the README has it, with one process."""
    return Python('-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--max-restarts=3',
                  '--rdzv_backend=c10d', f'--rdzv_endpoint=localhost:{port}', '--rdzv_id=dlip',
                  '--rdzv_conf=keep_alive_interval=1', 'pretrain_dlip.py', *options(config, out), *overrides,
                  TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')


def test_two_nodes_one_of_which_dies_and_comes_back(pretrained, tmp_path):
    config, _ = pretrained
    small = ('train.batch_size=4', 'train.epochs=6', 'train.save_every=1')
    port = get_free_port()
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
    """Weights, momentum encoder and queues are bit-identical; buffers are not broadcast, no parameter is unused."""
    config, _ = pretrained
    code = tmp_path / 'watched.py'
    code.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, pretrain_dlip
from torch.nn.parallel import DistributedDataParallel as Parallel
from models.engine.run_state import RunState
alone, quiet, end_epoch = [], Parallel.no_sync, RunState.end_epoch
Parallel.no_sync = lambda self: alone.append(1) or quiet(self)
def watched(self, *args):
    net = self.model
    settings = net.find_unused_parameters, net.gradient_as_bucket_view, net.will_sync_module_buffers()
    torch.save([self.objective.state_dict(), settings, len(alone)], {str(tmp_path)!r} + f'/rank{{os.environ["RANK"]}}')
    end_epoch(self, *args)
RunState.end_epoch = watched
pretrain_dlip.main()
""")
    for done in joined(2, code, *options(config, tmp_path / 'out'), 'train.epochs=1', 'train.batch_size=4',
                      'optim.grad_accum_steps=2'):
        assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f'rank{rank}') for rank in (0, 1))
    assert same(first[0], second[0]) and 'momentum.image_queue' in first[0]
    assert first[1] == (False, True, False)
    assert first[2] == 3  # 7 batches of each process are 3 updates of two and one of one


def test_a_process_whose_peer_has_left_ends_with_one_line(pretrained, tmp_path):
    """A signal to one of two alone, while they validate."""
    code = tmp_path / 'left.py'
    code.write_text(f'''import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import pretrain_dlip
from models.engine.stopping import STOP
from utils import clean_exit
validation = pretrain_dlip.validation
def left(*args, **kwargs):
    if os.environ['RANK'] == '1':
        os.kill(os.getpid(), signal.SIGTERM)
    return validation(*args, **kwargs)
pretrain_dlip.validation = left
with clean_exit(), STOP.ends():
    pretrain_dlip.main()
''')
    left, gone = joined(2, code, *options(pretrained[0], tmp_path / 'out'), 'train.batch_size=4')
    assert (left.returncode, gone.returncode) == (1, 0) and 'Traceback' not in left.stderr
    assert 'error: another process of this run has ended' in left.stderr
    assert read_checkpoint(tmp_path / 'out/last.pth')['batch'] == 7  # trained, and not yet judged


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
