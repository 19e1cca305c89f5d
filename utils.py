"""What every script needs: signals, errors, worker processes, files written whole.

Only the standard library is imported here: a script calls `end_at_once` before its slow imports, during which Python
would answer Ctrl-C with a traceback.
"""

import ctypes
import errno
import json
import logging
import multiprocessing
import os
import re
import reprlib
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TEMPORARY = f'.tmp{"[0-9a-f]" * 12}'  # how the names of `replacing` end, as a pattern of glob
PR_SET_PDEATHSIG = 1  # of Linux's prctl
FULL = {errno.ENOSPC, errno.EDQUOT}
REMEDIES = dict.fromkeys(FULL, ': the disk is full, make room or write elsewhere') | {
    errno.ENAMETOOLONG: ': choose a shorter one'}
# How worker processes start: under another method a killed parent may leave them behind, or they import for seconds.
WORKERS = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
# What ends a process: Ctrl-C, a scheduler, a closed terminal or ssh session.
SIGNALS = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}
if hasattr(signal, 'SIGHUP'):  # not on Windows
    SIGNALS[signal.SIGHUP] = 'SIGHUP, as the terminal was closed'
logger = logging.getLogger('dlip')


# ---------------------------------------------------------------- signals

class Interrupt(KeyboardInterrupt):
    """A signal has come.

    Attributes:
        code: exit code of a process that it ends.
    """

    def __init__(self, number: int):
        super().__init__(f'stopped by {SIGNALS[number]}')
        self.code = 128 + number


def listen(handler: Callable) -> Callable:
    """Let `handler(number, frame)` answer the signals, but for SIGHUP under nohup -> what is set for SIGINT now."""
    owner = os.getpid()

    def answer(number, frame):
        if os.getpid() == owner:
            handler(number, frame)
        elif number == signal.SIGTERM:  # in a new worker process, before `as_worker`
            os._exit(128 + number)

    for number in SIGNALS:
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, answer)
    return answer


def end_at_once() -> None:
    """From now on a signal ends the process with one line on stderr and exit code 128 + its number."""
    listen(_end)


@contextmanager
def interrupting():
    """A block in which the first signal raises `Interrupt`, and another one ends the process at once."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = listen(_interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is ours:  # a training's STOP stays
            for number, handler in before.items():
                signal.signal(number, handler)


def say(line: str) -> None:
    """Write a line to stderr, in a signal's handler too, and though the terminal may be gone."""
    with suppress(OSError):
        os.write(2, f'{line}\n'.encode())


def _interrupt(number, frame):
    end_at_once()
    raise Interrupt(number)


def _end(number, frame):
    if os.environ.get('RANK', '0') == '0':  # one line for all processes of torchrun
        say(f'stopped by {SIGNALS[number]}')
    os._exit(128 + number)


# ---------------------------------------------------------------- errors

class _Short(reprlib.Repr):
    def repr_int(self, x, level):  # Python refuses to print integers of thousands of digits
        return repr(x) if abs(x) < 10 ** self.maxlong else f'an integer of {x.bit_length()} bits'


def shorten(value, limit: int | None = None) -> str:
    """How a message quotes what it was given: one line of bounded length, whatever the value's length, depth or cycles.

    A path or an error is quoted as its text (400 characters unless `limit` says otherwise), anything else as its repr
    (80 characters).
    """
    if isinstance(value, os.PathLike | Exception):
        text, limit = str(value), limit or 400
    else:
        limit, short = limit or 80, _Short()
        short.maxlevel, short.maxstring, short.maxother = 3, limit, limit
        text = short.repr(value)
    text = re.sub(r'[\x00-\x1f\x7f\x85\u2028\u2029]+', ' ', text).strip()
    kept = (limit - 3) // 2
    return text if len(text) <= limit else f'{text[:limit - 3 - kept]}...{text[-kept:]}'


@contextmanager
def clean_exit():
    """Turn an expected failure into one line on stderr and exit code 1, a signal into one and 128 + its number.

    A fault of the program keeps its traceback; DLIP_TRACEBACK=1 shows every one. A reader of stdout that has had
    enough, such as `head`, ends the process without a word and with exit code 141.
    """
    try:
        with interrupting():
            yield
            print(end='', flush=True)
    except BrokenPipeError:
        sys.exit(128 + 13)  # as SIGPIPE ends other programs
    except (Exception, KeyboardInterrupt) as error:
        line = explanation(error)
        if line is None or os.environ.get('DLIP_TRACEBACK'):
            raise
        with suppress(OSError):  # the terminal may be gone
            print(line, file=sys.stderr)
        sys.exit(getattr(error, 'code', 130) if isinstance(error, KeyboardInterrupt) else 1)
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # else Python complains, as it exits, of a lost reader
            with suppress(OSError, ValueError):
                stream.flush()


def explanation(error: BaseException) -> str | None:
    """What a user reads of a failure and its remedy; None for a fault of the program."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return text or 'stopped by Ctrl-C'
    on_gpu = type(error).__name__ == 'OutOfMemoryError'  # torch's, which is not imported here
    if on_gpu or isinstance(error, MemoryError) or getattr(error, 'errno', None) == errno.ENOMEM or \
            isinstance(error, RuntimeError) and "can't allocate memory" in text:
        what = 'the GPU' if on_gpu else 'this machine'
        return (f'error: {what} is out of memory: lower the batch size (train.batch_size, for which '
                f'optim.grad_accum_steps makes up, eval.batch_size or --batch_size), data.num_workers or the size '
                f'of the net ({text[:120]})')
    if isinstance(error, RuntimeError) and text.startswith('DataLoader '):
        return (f'error: {text.splitlines()[0][:120]}: a process that loads images was killed, for want of memory or '
                f'of room in /dev/shm (in a container: --shm-size or --ipc=host), or waited for ever for a disk: lower '
                f'data.num_workers; 0 loads in the main process')
    if isinstance(error, RuntimeError) and re.search('Connection (closed|reset) by (remote )?peer', text):  # gloo's
        return ('error: another process of this run has ended, and so does this one: what it printed says why; the '
                'same command goes on with what is saved')
    wanting = isinstance(error, ImportError) and error.name is None  # ours: it says which package to install
    if not (wanting or isinstance(error, OSError | ValueError | FloatingPointError)):
        return None
    if 'Original Traceback' in text:  # of a loader's process: its last line is the error
        text = text.strip().splitlines()[-1].partition(': ')[2]
    remedy = REMEDIES.get(getattr(error, 'errno', None), '')
    return f'error: {shorten(ValueError(text), 1000)}{remedy}'


# ---------------------------------------------------------------- worker processes

def end_with_parent() -> bool:
    """Ask the kernel to kill this process when the thread that started it ends; whether this system can."""
    if sys.platform != 'linux':
        return False
    return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0


def as_worker(*_) -> None:
    """Prepare a worker process of a DataLoader or pool: it ends with its parent, and at its parent's word alone.

    Ctrl-C, a scheduler's SIGTERM and a closed terminal's SIGHUP reach every process of a job; what they end is the
    parent's to decide.
    """
    for number in SIGNALS.keys() - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_word, daemon=True).start()
    if end_with_parent() and os.getppid() != multiprocessing.parent_process().pid:
        os.kill(os.getpid(), signal.SIGKILL)  # the parent ended before


def _end_at_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


# ---------------------------------------------------------------- files

@contextmanager
def replacing(path: str | os.PathLike):
    """A new name beside `path` for a file that replaces it when the block ends well: whole or not at all.

    No two writers share a name, wherever they run. What a killed one leaves is called PATH.tmp and a random number.
    """
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp{secrets.token_hex(6)}')
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        for cause in (error, error.__context__):  # torch.save makes another error of a failed write
            if getattr(cause, 'errno', None) in FULL:  # it does not say of which file
                raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = 'w'):
    """Open a temporary file that replaces `path` when the block ends well: whole or not at all."""
    with replacing(path) as temporary, open(temporary, mode.replace('w', 'x'),
                                            encoding=None if 'b' in mode else 'utf-8') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def make_output_dir(path: str | os.PathLike, called: str = '--output_dir') -> Path:
    """Create a folder and prove that it can be written.

    Args:
        called: what the user chose it by.

    Raises:
        PermissionError: naming the folder and the remedy.
    """
    try:
        if not os.fspath(path):
            raise FileNotFoundError(errno.ENOENT, 'its name is empty')
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))  # a full disk lets files be made, but not written
    except (OSError, ValueError) as error:  # the latter of a name with a null character
        reason = getattr(error, 'strerror', None) or error
        raise PermissionError(f'cannot write to the output folder {shorten(Path(path))}: {reason}. Choose another '
                              f'{called}.') from None
    return Path(path)


def shown(name: str | os.PathLike) -> str:
    """A file name as one line of text that any stdout can print: as it is, or as a JSON string, from which
    `json.loads` gives the name back, where it holds line breaks, control characters or bytes that are no text."""
    name = os.fspath(name)
    try:
        name.encode(getattr(sys.stdout, 'encoding', None) or 'utf-8')
        return name if name.isprintable() else json.dumps(name)
    except UnicodeEncodeError:
        return json.dumps(name)
