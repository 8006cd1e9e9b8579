"""numpy tensors by canonical name: the form that both frameworks, files and conversions exchange."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from minillm_core.progress import Work

Array = Any
"""An array of numpy or of a framework."""

Tensors = dict[str, np.ndarray]
"""Tensors by canonical name, in canonical (out, in) layout."""


class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors by canonical name. Each one is made when it is accessed, and is not kept."""

    def __init__(self, names: Iterable[str], make: Callable[[str], np.ndarray]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def counted(tensors: Iterable[tuple[str, np.ndarray]], work: Work) -> Tensors:
    """Tensors that are made one at a time. Their values are counted."""
    found = {}
    for name, array in tensors:
        found[name] = array
        work.advance(array.size)
    return found
