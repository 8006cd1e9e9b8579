"""Reads the batches of the coming steps while a step runs."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

READ_AHEAD = 4
"""Batches that are read at the same time, each by its own thread: a store that answers slowly answers several requests
at once."""


@contextlib.contextmanager
def prefetched(read: Callable[[int], T], numbers: Iterable[int]) -> Iterator[Iterator[T]]:
    """The results of `read` for all numbers, in order. READ_AHEAD of them are read before they are asked for.

    An error is raised when its result is asked for.
    """
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="prefetch") as threads:
        waiting: deque[Future[T]] = deque()

        def results() -> Iterator[T]:
            for number in numbers:
                waiting.append(threads.submit(read, number))
                if len(waiting) > READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield results()
        finally:
            for future in waiting:
                future.cancel()
