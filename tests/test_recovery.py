"""Runs that are hurt end as if nothing had happened (bench/stress.py does this at many random places)."""

import subprocess

import pytest
from processes import joined, python

from bench.stress import prepare
from models.engine.logs import read_log
from models.weights.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def arguments(tmp_path_factory):
    """Of a short run of `pretrain_dlip.py`."""
    return prepare(tmp_path_factory.mktemp('stress'), 'tests/sizes.yaml:nano', 32)


def pretrain(arguments, out, *overrides) -> subprocess.CompletedProcess:
    return python('pretrain_dlip.py', '--output_dir', out, *arguments, *overrides)


def test_a_hurt_run_ends_bit_for_bit_as_the_unhurt_one():
    """One of each injury that no other test has: test_resume.py has the signals, test_distributed.py lost workers."""
    injuries = ('SIGKILL', 'killed while writing', 'disk full while writing', 'torn last.pth')
    done = python('-m', 'bench.stress', '--trials', str(len(injuries)), '--injuries', *injuries, '--size',
                  'tests/sizes.yaml:nano', '--image_size', '32')
    assert done.returncode == 0, done.stderr[-2000:]
    assert f'{len(injuries)} of {len(injuries)} ended bit for bit' in done.stdout
    assert all(f'| {injury} | 1 |' in done.stdout for injury in injuries)


def test_older_checkpoints_are_pruned(arguments, tmp_path):
    assert pretrain(arguments, tmp_path / 'out', 'train.save_every=1', 'train.keep_checkpoints=3').returncode == 0
    older = sorted(tmp_path.glob('out/epoch*.pth'))
    assert [path.name for path in older] == ['epoch1_batch4.pth', 'epoch1_batch5.pth', 'epoch1_batch6.pth']
    states = [read_checkpoint(path) for path in (*older, tmp_path / 'out/last.pth')]
    assert [(state['epoch'], state['batch']) for state in states] == [(1, 4), (1, 5), (1, 6), (2, 0)]


def test_a_run_with_only_damaged_checkpoints_says_so(arguments, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/last.pth').write_bytes(b'torn')
    done = pretrain(arguments, tmp_path / 'out')
    assert done.returncode == 1
    assert 'can be read' in done.stderr and 'delete them to start again' in done.stderr


def test_another_number_of_processes_goes_on_at_the_same_place(arguments, tmp_path):
    """One process for an epoch, then two of the same batch: half as many batches, from the same place."""
    out = tmp_path / 'out'
    assert pretrain(arguments, out, 'train.epochs=1').returncode == 0
    first, _ = joined(2, 'pretrain_dlip.py', '--output_dir', out, *arguments)
    assert first.returncode == 0, first.stderr[-2000:]
    assert [row['epoch'] for row in read_log(out / 'steps.txt')] == [0] * 7 + [1] * 3
    assert 'goes on at the same place' in first.stdout
