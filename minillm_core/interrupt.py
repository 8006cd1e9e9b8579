"""Records SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C, so that a run can save before it ends."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from minillm_core.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""SIGUSR1 is what Slurm can send some time before a limit (`sbatch --signal=B:USR1@120`)."""


class StopRequest:
    """A context that records the first of these signals. A second signal, more than one second later, ends the process.

    (A terminal, `timeout` or a scheduler may send one request twice.) Python handles signals only in the main thread;
    entered in any other thread, this context records nothing. Signals that are ignored stay ignored.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._came_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._came_at = signal.Signals(number), time.monotonic()
            # Not `print`, which this handler may have interrupted. The same Ctrl-C may have ended the reader of stderr.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{self.signal.name}: saving after this step; a second signal ends at once\n".encode())
        elif time.monotonic() > self._came_at + 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def check(self) -> None:
        """Raises Interrupted if a signal was recorded."""
        if self.signal is not None:
            raise Interrupted(self.signal)
