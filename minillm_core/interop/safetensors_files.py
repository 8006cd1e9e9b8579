"""Reads and writes safetensors files, the framework-independent format for tensors, one tensor at a time."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from minillm_core.errors import InputError
from minillm_core.files import first_bytes
from minillm_core.progress import ignore

PART_BYTES = 1 << 24
"""The size of the parts in which a tensor is read, rounded and written."""

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Name of a dtype in the format -> name of the dtype in numpy."""


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name, including bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], advance: Callable[[int], None] = ignore) -> None:
    """Writes tensors bit for bit. Unlike the library's `save_file`, it does not make a second copy of all tensors.

    Args:
        advance: called with the number of values that were written.
    """
    for dtype in {array.dtype for array in tensors.values()}:
        assert dtype.name in DTYPES.values(), dtype
    layout = {name: (array.shape, array.dtype.name) for name, array in tensors.items()}
    stream_safetensors(path, layout, tensors.items(), advance)


def stream_safetensors(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], str]],
    tensors: Iterable[tuple[str, np.ndarray]],
    advance: Callable[[int], None] = ignore,
) -> None:
    """Writes tensors that come one at a time, in the order of `layout`: name -> (shape, dtype to which it is rounded).

    Args:
        advance: called with the number of values that were written.

    Raises:
        InputError: a dtype cannot hold the values of a tensor.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # required by transformers
    end = 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + math.prod(shape) * numpy_dtype(dtype).itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, array), (expected, (shape, dtype)) in zip(tensors, layout.items(), strict=True):
            assert (name, array.shape) == (expected, shape), f"{name} {array.shape} where {expected} {shape} should be"
            for part in parts(array):
                file.write(np.ascontiguousarray(rounded(name, part, dtype)).view(np.uint8).data)
                advance(part.size)


def parts(array: np.ndarray) -> list[np.ndarray]:
    """Splits an array along its first dimension into parts of about PART_BYTES."""
    return np.array_split(np.atleast_1d(array), max(1, -(-array.nbytes // PART_BYTES)))


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor of a file. The file is mapped into memory one part at a time, because mapped memory counts as used.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            shape, dtype = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
            if not shape or dtype not in DTYPES:
                return file.get_tensor(name)
        array, start = np.empty(shape, numpy_dtype(DTYPES[dtype])), 0
        for rows in parts(array):
            with safetensors.safe_open(path, framework="numpy") as file:
                rows[:] = file.get_slice(name)[start : start + len(rows)]
            start += len(rows)
        return array
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(error, path) from error


def checked_weight(array: np.ndarray, name: str, where: Path) -> np.ndarray:
    """An imported weight. float64 is kept; smaller types become float32, which is exact.

    Raises:
        InputError: the weight has values that are not finite.
    """
    array = array if array.dtype == np.float64 else array.astype(np.float32)
    if n_bad := int(array.size - np.isfinite(array).sum()):
        found = f"{n_bad} of {array.size} values of {name}"
        raise InputError("a weight is not finite", found=found, where=where, hint="get the file again")
    return array


def rounded(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """A weight rounded to a dtype.

    Raises:
        InputError: finite values would overflow.
    """
    if array.dtype == numpy_dtype(dtype):
        return array
    with np.errstate(over="ignore"):
        result = array.astype(numpy_dtype(dtype))
    if np.isfinite(array).all() and not np.isfinite(result.astype(np.float32, copy=False)).all():
        raise InputError(f"{dtype} cannot hold the weights", found=name, hint="choose bfloat16 or float32")
    return result


def safetensors_layout(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype as named in the format) of every tensor of a file. Only the header is read.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(error, path) from error


def _damaged(error: Exception, path: Path) -> InputError:
    found, hint = str(error)[:200], "get the file again"
    if path.is_file() and not os.access(path, os.R_OK):
        found, hint = "no permission to read it", "change its permissions"
    elif first_bytes(path, 20) == b"version https://git-":
        found, hint = "a Git LFS pointer instead of the file", "run `git lfs pull`"
    return InputError("missing or damaged safetensors file", found=found, where=path, hint=hint)
