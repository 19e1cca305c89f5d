"""`python ARGUMENTS` without the seconds that its imports take: forked from a server that has made them."""

import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from utils import ROOT

FORKSERVER = multiprocessing.get_context('forkserver')
FORKSERVER.set_forkserver_preload([
    'pretrain_dlip', 'train_dlip_retrieval_flickr', 'train_dlip_caption_flickr', 'eval.report', 'eval.speed',
    'eval.zeroshot', 'prod', 'json_dataset', 'torch.distributed.run', 'tensorboard'])


class Python:
    """A started `python ARGUMENTS`, such as `pretrain_dlip.py --config X` or `-m eval.speed`, in the folder `cwd`.

    Attributes:
        pid: of the process.
    """

    def __init__(self, *arguments, cwd: Path = ROOT, **environment: str):
        self.arguments = [str(argument) for argument in arguments]
        self.printed = [Path(tempfile.mkstemp(prefix='dlip-test')[1]) for _ in range(2)]
        self.process = FORKSERVER.Process(target=_run, args=(
            self.arguments, cwd, os.environ | {'OMP_NUM_THREADS': '1'} | environment, self.printed))
        self.process.start()
        self.pid = self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        for path in self.printed:
            path.unlink(missing_ok=True)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Its exit code and what it printed.

        Raises:
            subprocess.TimeoutExpired: it was still running, and is killed.
        """
        self.process.join(timeout)
        late = self.process.is_alive()
        output, errors = (path.read_text(errors='surrogateescape') for path in self.printed)
        self.kill()
        if late:
            raise subprocess.TimeoutExpired(self.arguments, timeout, output, errors)
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, output, errors)


def _run(arguments: list[str], cwd: Path, environment: dict, printed: list[Path]) -> None:
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, encoding=environment.get('PYTHONIOENCODING'))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(int(environment['OMP_NUM_THREADS']))
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # a new Python's default
    first, *rest = arguments
    if first == '-m':
        sys.path.insert(0, str(cwd))
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # runpy warns of a module that was imported before
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name='__main__')


def run_by_path(script: Path, arguments: list[str], cwd: Path) -> tuple[int, str]:
    """`python SCRIPT ARGUMENTS` from a folder outside the repository -> (exit code, what it printed)."""
    receive, send = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=_run_by_path, args=(script, arguments, cwd, send))
    process.start()
    process.join(120)
    return process.exitcode, receive.recv() if receive.poll() else ''


def _run_by_path(script: Path, arguments: list[str], cwd: Path, send) -> None:
    def ours(path: str | None) -> bool:
        return Path(path or '.').resolve().is_relative_to(ROOT) and 'site-packages' not in path

    sys.path[:] = [str(script.parent), *(path for path in sys.path if not ours(path))]
    for name, module in list(sys.modules.items()):
        if ours(getattr(module, '__file__', None) or sys.executable) and name != __name__:
            del sys.modules[name]
    os.chdir(cwd)
    sys.argv = [str(script), *arguments]
    sys.stdout = io.StringIO()
    try:
        runpy.run_path(str(script), run_name='__main__')
    finally:
        send.send(sys.stdout.getvalue())


def python(*arguments, **environment: str) -> subprocess.CompletedProcess:
    return Python(*arguments, **environment).wait()


def joined(count: int, *arguments) -> list[subprocess.CompletedProcess]:
    """`python ARGUMENTS` in `count` processes that join as torchrun's do; none is ended because another one failed."""
    port = get_free_port()
    shared = {'WORLD_SIZE': str(count), 'LOCAL_WORLD_SIZE': str(count), 'MASTER_ADDR': 'localhost',
              'MASTER_PORT': str(port)}
    started = [Python(*arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    return [process.wait() for process in started]
