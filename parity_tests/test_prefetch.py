"""Batches that are read before they are asked for: in order, several at once, with their errors at the right step."""

import threading
import time
from pathlib import Path

import pytest

from minillm_core.data.prefetch import READ_AHEAD, prefetched
from minillm_core.errors import InputError


def test_several_results_are_read_at_once() -> None:
    """Each read waits until as many others have begun: one after the other, none would end. The order stays."""
    together = threading.Barrier(READ_AHEAD)

    def read(number: int) -> int:
        together.wait(timeout=30)
        return number

    numbers = range(7, 7 + 5 * READ_AHEAD)
    with prefetched(read, numbers) as results:
        assert [*results] == [*numbers]


def test_few_results_are_kept() -> None:
    """What is read ahead is limited, and nothing is read after the end."""
    begun: list[int] = []
    with prefetched(lambda n: begun.append(n) or n, range(1000)) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        time.sleep(0.05)
    assert len(begun) <= 3 + READ_AHEAD
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_error_comes_at_its_step() -> None:
    def read(number: int) -> int:
        if number == 2:
            raise InputError("a damaged file", where=Path("train.bin"))
        return number

    with prefetched(read, range(10)) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(InputError, match=r"damaged file[\s\S]*train.bin"):
            next(results)
