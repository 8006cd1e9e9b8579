"""The framework packages, imported when a command asks for them, with threads that do not get in each other's way."""

import os

from minillm_core.training import backend
from minillm_core.training.backend import Backend


def load_backend(framework: str, *, decoding: bool = False) -> Backend:
    """The package of a framework by name.

    Raises:
        InputError: the framework is not installed.
    """
    let_threads_sleep(decoding=decoding)
    return backend.load_backend(framework)


def let_threads_sleep(*, decoding: bool = False) -> None:
    """Keeps torch's waiting threads from spinning; to be called before torch is imported.

    On busy cores they made a training step take 4 to 7 times longer. A decoding step has a hundred short waits: there
    threads that sleep at once cost a factor of 2.5, so they sleep after a while.
    """
    os.environ.setdefault(*(("GOMP_SPINCOUNT", "30000") if decoding else ("OMP_WAIT_POLICY", "passive")))
