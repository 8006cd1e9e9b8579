"""The framework packages, imported when a command asks for them by name."""

import importlib
import os
from typing import cast

from minillm_core.backend import Backend
from minillm_core.errors import InputError


def load_backend(framework: str, *, decoding: bool = False) -> Backend:
    """The package of a framework, imported when asked for by name.

    Raises:
        InputError: the framework is not installed.
    """
    # Read when torch is imported. Its waiting threads otherwise spin: on busy cores a step took 4 to 7 times longer.
    # Decoding has a hundred short waits for every token, and took 2.5 times longer with threads that sleep at once.
    os.environ.setdefault(*(("GOMP_SPINCOUNT", "30000") if decoding else ("OMP_WAIT_POLICY", "passive")))
    try:
        return cast(Backend, importlib.import_module(f"minillm_{framework}"))
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("minillm"):
            raise
        raise InputError(
            f"{framework} is not installed",
            found=f"no module {error.name}",
            do=f"pip install -c constraints.txt -e '.[{framework}]'",
        ) from error
