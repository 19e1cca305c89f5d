"""What ends a process: SIGINT (Ctrl-C), SIGTERM (a scheduler) and SIGHUP (the terminal or ssh session was closed).

A script calls `end_at_once` before its slow imports, during which Python would answer Ctrl-C with a traceback.
`utils.clean_exit` takes over for `main`, and a training's `STOP` for the training.
"""

import os
import signal
from collections.abc import Callable
from contextlib import contextmanager, suppress

NAMES = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}
if hasattr(signal, 'SIGHUP'):  # not on Windows
    NAMES[signal.SIGHUP] = 'SIGHUP, as the terminal was closed'


class Interrupt(KeyboardInterrupt):
    """A signal has come.

    Attributes:
        code: exit code of a process that it ends.
    """

    def __init__(self, number: int):
        super().__init__(f'stopped by {NAMES[number]}')
        self.code = 128 + number


def listen(handler: Callable) -> Callable:
    """Let `handler(number, frame)` answer the signals, but for SIGHUP under nohup -> what is set for SIGINT now."""
    owner = os.getpid()

    def answer(number, frame):
        if os.getpid() == owner:
            handler(number, frame)
        elif number == signal.SIGTERM:  # in a new worker process, before `utils.as_worker`
            os._exit(128 + number)

    for number in NAMES:
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, answer)
    return answer


def end_at_once() -> None:
    """From now on a signal ends the process with one line on stderr and exit code 128 + its number."""
    listen(_end)


@contextmanager
def interrupting():
    """A block in which the first signal raises `Interrupt`, and another one ends the process at once."""
    before = {number: signal.getsignal(number) for number in NAMES}
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
        say(f'stopped by {NAMES[number]}')
    os._exit(128 + number)
