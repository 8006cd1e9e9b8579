"""Progress of work that may take long: how much there is, and how much is done.

Code that may run long opens a unit of work and counts. A listener, such as the progress bar of the command line, looks
at the count whenever it likes. So counting costs the same with and without a listener; without one, nothing is shown.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


class Work:
    """A unit of work."""

    def __init__(self, doing: str, total: int | None, unit: str):
        """
        Args:
            doing: what is done, in words.
            total: the size of the whole work, in units; None if it is not known.
            unit: what is counted: B (bytes), token, file, ...
        """
        self.doing, self.total, self.unit = doing, total, unit
        self.done = 0
        """What is finished, including `skipped`."""
        self.skipped = 0
        """What took no time here: it was done before, or need not be done."""
        self._lock = threading.Lock()

    def advance(self, n: int = 1) -> None:
        """Counts n more units; from any thread."""
        with self._lock:
            self.done += n

    def skip(self, n: int) -> None:
        """Counts n more units that took no time."""
        with self._lock:
            self.done, self.skipped = self.done + n, self.skipped + n

    def finish(self) -> None:
        """Skips all that is left."""
        if self.total is not None:
            self.skip(self.total - self.done)


Listener = Callable[[Work], AbstractContextManager[object]]
"""Work that begins -> a context that lasts as long as the work does. Meanwhile the listener may look at it."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def listen(listener: Listener | None) -> None:
    """Installs the listener of this thread, in place of an earlier one. Other threads are not reported: the user does
    not wait for work in the background."""
    _listener.set(listener)


@contextmanager
def progress(doing: str, total: int | None, unit: str) -> Iterator[Work]:
    """Opens a unit of work (the arguments are those of `Work`). Nested units are not reported."""
    work, listener = Work(doing, total, unit), _listener.get()
    if listener is None:
        yield work
        return
    _listener.set(None)
    try:
        with listener(work):
            yield work
    finally:
        _listener.set(listener)


def steps(items: Sequence[T], doing: str, unit: str) -> Iterator[T]:
    """The items, for a loop that works on each. A loop that ends early leaves the work unfinished. The unit is open
    until the loop ends: use this in a `for` statement only."""
    with progress(doing, len(items), unit) as work:
        for item in items:
            yield item
            work.advance()


def ignore(n: int) -> None:
    """Counts nothing: stands for `Work.advance` where nobody counts."""
