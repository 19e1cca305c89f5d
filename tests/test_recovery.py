"""Runs that are hurt end as if nothing had happened (bench/stress.py does this at many random places)."""

import random

import pytest
import torch

from bench.stress import INJURIES, SAVE_EVERY, differences, launch, prepare, steps_done, torchrun, trial
from models.checkpoint import read_checkpoint
from models.logs import read_log


@pytest.fixture(scope='module')
def short_run(tmp_path_factory):
    """(arguments of a short run, its folder when nothing hurts it)"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a process with threads of its own cannot be forked
    folder = tmp_path_factory.mktemp('stress')
    arguments = prepare(folder, 'nano', 32)
    launch(arguments, folder / 'unhurt').join()
    yield arguments, folder / 'unhurt'
    torch.set_num_threads(threads)


@pytest.mark.parametrize('injury', [name for name in INJURIES if name != 'worker killed'])
def test_a_hurt_run_ends_as_the_unhurt_one(short_run, tmp_path, injury):
    arguments, unhurt = short_run
    again = trial(injury, arguments, tmp_path / 'out', random.Random(2), steps_done(unhurt))
    assert again <= SAVE_EVERY * (2 if injury == 'torn last.pth' else 1)
    assert differences(tmp_path / 'out', unhurt) == []
    assert not list((tmp_path / 'out').glob('*.tmp*'))


def test_torchrun_restarts_after_a_killed_worker(short_run, tmp_path):
    arguments, unhurt = short_run
    done = torchrun(arguments, tmp_path / 'two')
    trial('worker killed', arguments, tmp_path / 'out', random.Random(1), steps_done(unhurt))
    assert done.wait() == 0 and differences(tmp_path / 'out', tmp_path / 'two') == []


def test_older_checkpoints_are_pruned(short_run, tmp_path):
    arguments, _ = short_run
    launch([*arguments, 'train.save_every=1', 'train.keep=3'], tmp_path / 'out').join()
    older = sorted(tmp_path.glob('out/epoch*.pth'))
    assert [path.name for path in older] == ['epoch1_batch4.pth', 'epoch1_batch5.pth', 'epoch1_batch6.pth']
    states = [read_checkpoint(path) for path in (*older, tmp_path / 'out/last.pth')]
    assert [(state['epoch'], state['batch']) for state in states] == [(1, 4), (1, 5), (1, 6), (2, 0)]


def test_a_run_with_only_damaged_checkpoints_says_so(short_run, tmp_path):
    arguments, _ = short_run
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/last.pth').write_bytes(b'torn')
    process = launch(arguments, tmp_path / 'out')
    process.join()
    assert process.exitcode == 1
    assert 'can be read' in (tmp_path / 'out.log').read_text() and 'delete them to start again' in (
        tmp_path / 'out.log').read_text()


def test_another_number_of_processes_goes_on_at_the_same_place(short_run, tmp_path):
    """One process for an epoch, then two of the same batch: half as many batches, from the same place."""
    arguments, _ = short_run
    out = tmp_path / 'out'
    launch([*arguments, 'train.epochs=1'], out).join()
    assert torchrun(arguments, out, batch_size=8).wait() == 0
    rows = read_log(out / 'steps.txt')
    assert [row['epoch'] for row in rows] == [0] * 7 + [1] * 3
    assert 'goes on at the same place' in out.with_suffix('.log').read_text()
