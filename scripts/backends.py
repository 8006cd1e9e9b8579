"""The framework packages, imported when a command asks for them by name."""

import importlib
import os
from typing import cast

from minillm_core.backend import Backend
from minillm_core.errors import InputError


def load_backend(framework: str) -> Backend:
    """The package of a framework, imported when asked for by name.

    Raises:
        InputError: the framework is not installed.
    """
    # Read when torch is imported. Its waiting threads otherwise spin: on busy cores a step took 4 to 7 times longer.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
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
