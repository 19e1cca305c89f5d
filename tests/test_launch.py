"""Processes: how they find each other, end together, keep out of each other's folders and say what stopped them."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import Python
from runs import options, run

import pretrain_dlip
from bench.stress import workers_of
from data import folders, loader
from data.index import build_index
from models.engine.checkpoint_manager import CheckpointManager
from models.engine.launch import choose_device, hosts, place
from models.engine.logs import read_log
from models.weights.checkpoint import read_checkpoint
from utils import ROOT, SIGNALS, atomic_write, clean_exit, make_output_dir

pytestmark = pytest.mark.slow

TASK = {'SLURM_JOB_ID': '1234', 'SLURM_STEP_ID': '0', 'SLURM_PROCID': '5', 'SLURM_NTASKS': '11', 'SLURM_LOCALID': '1',
        'SLURM_NODEID': '1', 'SLURM_JOB_NODELIST': 'gpu[001-003]', 'SLURM_STEP_TASKS_PER_NODE': '4(x2),3'}


# ---------------------------------------------------------------- SLURM

@pytest.mark.parametrize('names, expanded', [
    ('gpu[001-003,007],cpu12', 'gpu001 gpu002 gpu003 gpu007 cpu12'), ('a[1-2]b', 'a1b a2b'), ('n-1', 'n-1'), ('', ''),
    ('r[1-2]n[08-10]', 'r1n08 r1n09 r1n10 r2n08 r2n09 r2n10')])
def test_lists_of_nodes(names, expanded):
    assert hosts(names) == expanded.split()


def test_a_task_of_srun_is_a_process_of_the_run():
    here = place(TASK)
    assert here[:4] == (5, 11, 1, 4) and here.address.startswith('gpu001:')
    assert place(TASK | {'SLURM_NODEID': '2'}).local_size == 3
    others = {place(TASK | change).address for change in ({'SLURM_JOB_ID': '1235'}, {'SLURM_STEP_ID': '1'})}
    assert len(others) == 2 and here.address not in others
    assert place(TASK | {'MASTER_ADDR': 'x', 'MASTER_PORT': '7'}).address == 'x:7'
    with pytest.raises(ValueError, match="SLURM_NTASKS is 'many': it must be a number"):
        place(TASK | {'SLURM_NTASKS': 'many'})


@pytest.mark.parametrize('change', [{'SLURM_STEP_ID': ''}, {'SLURM_STEP_ID': 'batch'}, {'SLURM_STEP_ID': '4294967291'},
                                    {'SLURM_STEP_ID': '4294967290'}, {'SLURM_PTY_PORT': '1'}, {'SLURM_NTASKS': '1'}])
def test_what_srun_did_not_launch_is_one_process(change):
    assert place(TASK | change) is None


def test_torchrun_within_a_job_wins():
    assert place(TASK | {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1'})[:3] == (1, 2, 1)


def test_srun_trains_as_torchrun_does(pretrained, tmp_path):
    task = TASK | {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_NTASKS': '2', 'SLURM_JOB_NODELIST': 'gpu[007]'}
    started = [Python('pretrain_dlip.py', *options(pretrained[0], tmp_path), 'train.epochs=1', 'train.batch_size=4',
                      **task | {'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank)}) for rank in range(2)]
    for process in started:
        done = process.wait(100)
        assert done.returncode == 0, done.stderr[-2000:]
    assert read_checkpoint(tmp_path / 'last.pth')['world_size'] == 2


# ---------------------------------------------------------------- ends

@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux ends processes with their parent')
def test_ranks_end_with_torchrun(pretrained, tmp_path):
    config, _ = pretrained
    agent = Python('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'pretrain_dlip.py',
                   *options(config, tmp_path), 'train.epochs=10000', 'train.batch_size=4', 'data.num_workers=1')
    deadline = time.monotonic() + 100
    while len(read_log(tmp_path / 'steps.txt')) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = workers_of(agent.pid)
    agent.kill()
    deadline = time.monotonic() + 5
    while any(map(running, ranks)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(ranks) == 2 and not any(map(running, ranks))
    with folders.locked(tmp_path):  # the lock ended with its holder
        pass


def running(process: int) -> bool:
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system does not fork')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_every_process_of_a_job_loses_nothing(pretrained, tmp_path, number):
    """As `scancel` and `timeout` send it, and the end of an ssh session."""
    training = Python('pretrain_dlip.py', *options(pretrained[0], tmp_path), 'train.epochs=10000', 'train.batch_size=4',
                      'train.save_every=0', 'data.num_workers=2')
    deadline = time.monotonic() + 100
    while len(read_log(tmp_path / 'steps.txt')) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in (*workers_of(training.pid), training.pid):
        os.kill(pid, number)
    done = training.wait(60)
    assert done.returncode == 0, done.stderr[-2000:]
    state = read_checkpoint(tmp_path / 'last.pth')
    assert state['epoch'] or state['batch']


def test_a_forked_child_captions(caption, picture):
    """The threads of the parent's operations are not in the child, which must not wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = caption.generate(picture)
        torch.ones(500, 500) @ torch.ones(500, 500)
        child = multiprocessing.get_context('fork').Process(target=lambda: sys.exit(caption.generate(picture) != want))
        child.start()
        child.join(60)
        child.kill()
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(threads)


TOOLS = [path.relative_to(ROOT) for pattern in ('*.py', 'data/*.py', 'eval/*.py', 'prod/*.py')
         for path in sorted(ROOT.glob(pattern)) if "\nif __name__ == '__main__':" in path.read_text()]


@pytest.mark.parametrize('tool, number, by_name', [
    *((tool, signal.SIGINT, False) for tool in TOOLS), *((TOOLS[0], number, True) for number in SIGNALS)], ids=str)
def test_a_signal_during_the_imports_is_one_line(tool, number, by_name, tmp_path):
    """It comes with the first import of a package that takes long."""
    for name in ('numpy', 'torch', 'PIL'):
        (tmp_path / f'{name}.py').write_text(f'import os, time; os.kill(os.getpid(), {number}); time.sleep(9)')
    how = ['-m', '.'.join(tool.with_suffix('').parts)] if by_name else [tool]
    done = subprocess.run([sys.executable, *how], cwd=ROOT, env=os.environ | {'PYTHONPATH': str(tmp_path)},
                          capture_output=True, text=True)
    assert done.returncode == 128 + number and done.stderr.startswith('stopped by ')
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('block, code, message', [
    ('os.kill(os.getpid(), signal.SIGTERM)', 143, 'stopped by SIGTERM\n'),
    ('os.kill(os.getpid(), signal.SIGHUP)', 129, 'stopped by SIGHUP, as the terminal was closed\n'),
    ('signal.signal(signal.SIGHUP, signal.SIG_IGN); end_at_once(); os.kill(os.getpid(), signal.SIGHUP)', 0, ''),
    ('print("x")', 141, ''), ('print("x" * 10 ** 6)', 141, ''),
    ('logging.basicConfig(stream=sys.stdout); logging.raiseExceptions = False; logging.warning("x")', 0, '')])
def test_a_script_ends_without_a_traceback(block, code, message, tmp_path):
    """Signals within `clean_exit`, nohup, and a stdout that nobody reads."""
    script = tmp_path / 'script.py'
    script.write_text(f"""
import logging, os, signal, sys
from utils import clean_exit, end_at_once
ours, other = os.pipe()
os.close(ours)
os.dup2(other, 1)
with clean_exit():
    {block}
""")
    done = Python(script).wait()
    assert (done.returncode, done.stderr) == (code, message)


@pytest.mark.parametrize('error, code, message', [
    (KeyboardInterrupt(), 130, 'stopped by Ctrl-C\n'), (MemoryError(), 1, 'lower the batch size'),
    (torch.OutOfMemoryError('CUDA out of memory.'), 1, 'the GPU is out of memory: lower the batch size'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is'), 1, '/dev/shm'),
    (RuntimeError('DataLoader timed out after 1800 seconds'), 1, 'data.num_workers'),
    (OSError(errno.ENOSPC, 'No space left on device', 'x'), 1, "'x': the disk is full, make room"),
    (ValueError('Caught ValueError in DataLoader worker process 0.\nOriginal Traceback\n  File\nValueError: a: b\n'), 1,
     'error: a: b\n'),
    (ImportError('backend onnx needs the package: pip install onnxruntime'), 1, 'error: backend onnx needs')])
def test_a_failure_is_one_line(error, code, message, capsys):
    with pytest.raises(SystemExit) as stop, clean_exit():
        raise error
    printed = capsys.readouterr().err
    assert stop.value.code == code and message in printed and printed.count('\n') == 1


@pytest.mark.parametrize('error', [RuntimeError('shapes differ'), KeyError('a'), TypeError('b'),
                                   ModuleNotFoundError("No module named 'c'", name='c')])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)), clean_exit():
        raise error


@pytest.mark.parametrize('name', ['banana', 'meta', 'cpu:7', 'xpu', '', 'cuda:-1', None, 'cuda:99999999999'])
def test_no_such_device(name):
    with pytest.raises(ValueError, match='unknown device .*: use auto, cpu, cuda, cuda:N or mps'):
        choose_device(name)


# ---------------------------------------------------------------- folders and files

def test_a_second_run_in_a_folder_stops(pretrained, tmp_path, monkeypatch):
    """Until the first has ended, however it ended; a dry run may stand beside it."""
    monkeypatch.setattr(folders, 'LOCK_WAIT', 0.1)
    holder = subprocess.Popen([sys.executable, '-c', 'import filelock, sys\nlock = filelock.FileLock(sys.argv[1])\n'
                               'lock.acquire()\nprint("held", flush=True)\nsys.stdin.read()', tmp_path / '.lock'],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ValueError, match='another run is writing to .*: wait for it or stop it'):
        run(pretrain_dlip, pretrained[0], tmp_path)
    pretrain_dlip.main([*options(pretrained[0], tmp_path), '--dry_run'])
    assert os.listdir(tmp_path) == ['.lock']
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run(pretrain_dlip, pretrained[0], tmp_path, 'train.epochs=1')


def test_writers_with_the_same_process_number(tmp_path):
    """As in two containers on a shared disk; what they write has the permissions that open() gives."""
    path = tmp_path / 'file'
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write('1')
        second.write('2')
    assert path.read_text() == '1'
    (tmp_path / 'plain').touch()
    assert path.stat().st_mode == (tmp_path / 'plain').stat().st_mode
    path.chmod(0o640)
    with pytest.raises(KeyError), atomic_write(path):
        raise KeyError
    with atomic_write(path) as file:
        file.write('3')
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ['file', 'plain']


def test_what_killed_writers_left_is_deleted_when_it_is_old(tmp_path):
    (tmp_path / 'all.json').write_text('[{"caption": "a dog", "image_root": "a.jpg", "id": 0}]')
    old, new = tmp_path / f'all.json.arrow.tmp{1:012x}', tmp_path / f'all.json.arrow.tmp{2:012x}'
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    build_index(tmp_path / 'all.json')
    assert new.exists() and not old.exists()


def test_a_run_deletes_no_file_of_the_users(tmp_path):
    left, own = tmp_path / 'last.pth.tmp0123456789ab', tmp_path / 'notes.tmpl'
    for path in (left, own):
        path.touch()
    CheckpointManager(tmp_path, 1).sweep()
    assert own.exists() and not left.exists()


@pytest.mark.parametrize('name', ['', 'x' * 300, 'file', 'file/sub', 'a\0b'])
def test_an_impossible_output_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path('file').touch()
    with pytest.raises(PermissionError, match='cannot write to the output folder .*Choose another'):
        make_output_dir(name)


# ---------------------------------------------------------------- shared memory

def batches() -> list:
    return list(loader.load(list(torch.ones(8, 100_000)), 2, batch_size=2))


@pytest.mark.skipif(not loader.SHARED_MEMORY.is_dir(), reason='this system has no /dev/shm')
def test_too_little_shared_memory_is_named_before_training(monkeypatch):
    assert len(batches()) == 4
    room = SimpleNamespace(total=3_000_000, free=3_000_000)
    monkeypatch.setattr(loader.shutil, 'disk_usage', lambda path: room)
    with pytest.raises(ValueError, match='1 processes x 2 workers x 2 batches of 1 MiB need 4 MiB; it has 3 MiB, .*'
                                         '--shm-size=1g, or --ipc=host.*data.num_workers=1;'):
        batches()


@pytest.mark.skipif(not loader.SHARED_MEMORY.is_dir(), reason='this system has no /dev/shm')
def test_shared_memory_that_fills_up_ends_the_run(monkeypatch):
    def full(tensor):
        raise RuntimeError('unable to allocate shared memory(shm) for file </x>: No space left on device (28)')
    monkeypatch.setattr(torch.Tensor, 'share_memory_', full)
    with pytest.raises(OSError, match='/dev/shm is full.*--ipc=host'):
        batches()


@pytest.mark.skipif(not loader.SHARED_MEMORY.is_dir(), reason='this system has no /dev/shm')
def test_shared_memory_without_room_for_a_semaphore_is_named(monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(loader.WORKERS, 'Lock', full)
    with pytest.raises(OSError, match='/dev/shm is full.*--ipc=host.*data.num_workers=1;'):
        batches()
