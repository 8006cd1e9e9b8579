"""Imports a framework package when a command needs it, with settings that keep idle threads off the CPU cores."""

import os

from minillm_core.training import backend
from minillm_core.training.backend import Backend


def load_backend(framework: str, *, decoding: bool = False) -> Backend:
    """Imports the package of a framework by its name, `jax` or `torch`.

    Raises:
        InputError: the framework is not installed.
    """
    let_threads_sleep(decoding=decoding)
    return backend.load_backend(framework)


def let_threads_sleep(*, decoding: bool = False) -> None:
    """Keeps torch's waiting threads from spinning. Call this before torch is imported.

    On busy cores, spinning threads made a training step take 4 to 7 times longer. A decoding step has a hundred short
    waits, and threads that sleep at once make it 2.5 times slower; for decoding, they spin for a while and then sleep.
    """
    os.environ.setdefault(*(("GOMP_SPINCOUNT", "30000") if decoding else ("OMP_WAIT_POLICY", "passive")))
