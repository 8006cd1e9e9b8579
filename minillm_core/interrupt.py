"""SIGTERM and Ctrl-C: noted, so that a run can save before it ends."""

import os
import signal
import threading
from types import FrameType

from minillm_core.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is noted; the second has its usual effect.

    Signals reach a process's main thread; entered from another one, it notes nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._usual: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._usual = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        while self._usual:
            number, handler = self._usual.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()
        # Not `print`: a handler may interrupt one.
        os.write(2, f"\n{self.signal.name}: saving after this step; a second one stops at once\n".encode())

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.signal is not None:
            raise Interrupted(self.signal)
