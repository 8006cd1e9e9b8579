"""Batches that are read before they are asked for: in order, in time, and with their errors at the right step."""

import threading
import time
from pathlib import Path

import pytest

from minillm_core.data.prefetch import READ_AHEAD, prefetched
from minillm_core.errors import InputError


def test_results_are_in_order_and_ready() -> None:
    """A store that needs 20 ms for an answer does not delay steps of 10 ms: it is asked several things at once."""
    waits = []

    def read(number: int) -> int:
        time.sleep(0.02)
        return number

    with prefetched(read, range(7, 37)) as results:
        for number in range(7, 37):
            begin = time.perf_counter()
            assert next(results) == number
            waits.append(time.perf_counter() - begin)
            time.sleep(0.01)
    assert sum(waits[1:]) < 0.1 * 0.02 * 29, "one after the other, each step would wait 10 ms"


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
