"""The progress bar: one unit of work at a time, on stderr, with the time left. Nothing if stderr is no terminal."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

from minillm_core.progress import Work

APPEARS_AFTER, LOOKS_EVERY = 1.0, 0.25
"""Seconds: work that takes less has no bar; how often the bar looks at the work."""

COUNTED = "{desc} {percentage:3.0f}% |{bar}| {remaining} left, {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {elapsed} passed"
UNCOUNTED = "{desc}, {elapsed} passed"

tqdm.set_lock(threading.RLock())  # the default also locks out other processes, of which none writes here
tqdm.monitor_interval = 0  # a thread for bars that do not look themselves


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class _Bar:
    """Shows a unit of work. A thread of its own draws it, so its clock also runs while the work is in a long call."""

    def __init__(self, work: Work):
        self._work, self._started, self._ended = work, time.time(), threading.Event()
        self._shown: tqdm[Any] | None = None
        threading.Thread(target=self._show, name="progress", daemon=True).start()

    def end(self) -> None:
        """Draws the bar for the last time. Not in its thread: a signal may come while this thread prints a message."""
        with tqdm.get_lock(), contextlib.suppress(OSError):
            self._ended.set()
            if self._shown is not None:
                self._draw(self._shown)
                self._shown.close()

    def _show(self) -> None:
        wait = APPEARS_AFTER
        while not self._ended.wait(wait):
            wait = LOOKS_EVERY
            with tqdm.get_lock(), contextlib.suppress(OSError):
                if not self._ended.is_set():
                    self._shown = self._new() if self._shown is None else self._shown
                    self._draw(self._shown)

    def _draw(self, bar: "tqdm[Any]") -> None:
        bar.n, bar.initial = self._work.done, self._work.skipped  # the rate is that of the rest
        bar.refresh()

    def _new(self) -> "tqdm[Any]":
        work = self._work
        bar: tqdm[Any] = tqdm(
            desc=work.doing,
            total=work.total,
            unit=work.unit if work.unit == "B" else f" {work.unit}",
            unit_scale=work.total is None or work.total >= 1000,
            bar_format=UNCOUNTED if work.total is None else COUNTED,
            dynamic_ncols=True,
            file=sys.stderr,
            delay=APPEARS_AFTER,
        )
        bar.start_t, bar.delay = self._started, 0  # the delay is over; with it, nothing is drawn before the time is set
        return bar


_bar: _Bar | None = None


@contextlib.contextmanager
def progress_bar(work: Work) -> Iterator[None]:
    """Shows a unit of work as long as this context lasts."""
    global _bar
    if not on_terminal():
        yield
        return
    _bar = _Bar(work)
    try:
        yield
    finally:
        end_bar()


def end_bar() -> None:
    """Ends the bar, if there is one; the terminal goes on with a new line."""
    global _bar
    if _bar is not None:
        _bar.end()
        _bar = None


def above_bar() -> AbstractContextManager[None]:
    """A context for printing to stderr: a bar is removed, and drawn again below what was printed."""
    return tqdm.external_write_mode(file=sys.stderr)
