"""Imports a framework package when a command needs it, with settings that keep idle threads off the CPU cores."""

from minillm_cli.process import let_threads_sleep
from minillm_core.training import backend
from minillm_core.training.backend import Backend


def load_backend(framework: str, *, decoding: bool = False) -> Backend:
    """Imports the package of a framework by its name, `jax` or `torch`.

    Raises:
        InputError: the framework is not installed.
    """
    let_threads_sleep(decoding=decoding)
    return backend.load_backend(framework)
