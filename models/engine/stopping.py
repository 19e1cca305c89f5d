"""How training answers SIGTERM, SIGHUP and Ctrl-C."""

import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch.distributed as dist

from utils import listen, say


class StopSignal:
    """SIGTERM, SIGHUP and SIGINT end the process at once or, within `hold`, once the loop has saved its state. After
    one of them Ctrl-C kills the process.

    Attributes:
        received: whether a signal has come.
        code: exit code of a process that is ended; None: 128 + the signal's number.
    """

    def __init__(self):
        self.received, self.held, self.waiting, self.code = False, False, False, None

    def listen(self, code: int | None = None) -> None:
        """Handle signals from now on; earlier ones are forgotten."""
        self.received, self.held, self.waiting, self.code = False, False, False, code
        listen(self._receive)

    def _receive(self, number, frame):
        if self.received:
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return  # a scheduler signals torchrun and its processes, and torchrun its processes again
        self.received = True
        if self.code is None:
            self.code = 128 + number
        if not self.held:
            self.leave()
        if self.waiting:
            self.waiting = False
            raise Stopped(self.code)

    @contextmanager
    def ends(self):
        """A block in which a RuntimeError after a signal means that the signal has ended another process of the run."""
        try:
            yield
        except RuntimeError:
            if self.received:
                sys.exit(self.code)
            raise

    def leave(self) -> None:
        """End the process.

        Raises:
            Stopped: always.
        """
        if not dist.is_initialized() or dist.get_rank() == 0:  # not by print, within which the signal may have come
            say('\nstopped by a signal; the same command goes on with what is saved')
        raise Stopped(self.code)

    @contextmanager
    def hold(self):
        """A block that a signal does not interrupt: it takes effect afterwards."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before
        if self.received and not self.held:
            self.leave()

    def unless_received(self, wait: Callable):
        """`wait()`, or None once a signal has come, within `hold` too; for waits that may be cut short."""
        try:
            self.waiting = self.held
            try:
                return None if self.received else wait()
            finally:
                self.waiting = False
        except Stopped:
            if not self.held:
                raise
            return None


class Stopped(SystemExit):
    """A signal ends the process."""


STOP = StopSignal()  # of this process
