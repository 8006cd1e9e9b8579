"""Reads the header of a GGUF file with strict checks, and dequantises its tensors.

The `gguf` package's own reader trusts the counts and lengths in the file: 58 bytes are enough to make it use unlimited
memory. Therefore the header is read here, and every number in it is compared with the size of the file before use. The
package is used for the types of tensors, to dequantise their blocks, and to write headers.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minillm_core.errors import InputError, missing_package

HEADER_BYTES = 1 << 26
"""The longest header that is accepted. A vocabulary of 256,000 tokens with its merges takes 15 MB."""

LARGEST_COUNT = 1 << 16
"""The largest number of tensors or keys that is accepted. A model of 80 layers has 723 tensors."""

SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9


def gguf_package() -> Any:
    """The `gguf` package, imported only when it is needed.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise missing_package(error, "gguf") from error
    return gguf


@dataclass(frozen=True)
class GGUFTensor:
    """The location of a tensor in a file."""

    type: int
    shape: tuple[int, ...]
    """In numpy's order: the last dimension is contiguous."""
    offset: int
    """In bytes, from the beginning of the file."""
    n_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A checked header. The tensors have not been read yet."""

    path: Path
    fields: dict[str, Any]
    """Key -> a Python number or string, a list of strings, or a numpy array of numbers."""
    tensors: dict[str, GGUFTensor]

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32.

        Raises:
            InputError: the file has become shorter since its header was read.
        """
        gguf, tensor = gguf_package(), self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.type)
        with self.path.open("rb") as file:
            data = np.fromfile(file, np.uint8, tensor.n_bytes, offset=tensor.offset)
        if data.size != tensor.n_bytes:
            raise InputError("truncated tensor", found=name, where=self.path, hint="get the file again")
        with np.errstate(all="ignore"):  # the caller checks for values that are not finite
            array: np.ndarray = gguf.dequantize(data.reshape(*tensor.shape[:-1], -1), kind)
        return array.reshape(tensor.shape)


def read_gguf(path: Path) -> GGUFFile:
    """Reads and checks a header. Memory and time are bounded for every file, including hostile ones.

    Raises:
        InputError: the file is not a GGUF file, is damaged, or has tensors of a type that cannot be dequantised.
    """
    if not path.is_file():
        raise InputError("no such file", expected="a .gguf file", where=path, hint="check the path")
    try:
        with path.open("rb") as file:
            return _Header(file, path).read()
    except (struct.error, UnicodeDecodeError) as error:
        raise InputError("damaged GGUF file", found=error, where=path, hint="get the file again") from error


@lru_cache
def _block_of(kind: int) -> tuple[int, int]:
    """The number of values and of bytes in a block of a type. Raises an error of the package for an unknown type."""
    gguf = gguf_package()
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    gguf.dequantize(np.zeros((1, block_bytes), np.uint8), gguf.GGMLQuantizationType(kind))
    return block, block_bytes


class _Header:
    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.at, self.size = file, path, 0, path.stat().st_size

    def read(self) -> GGUFFile:
        if self.size < 24 or (begin := self.take(4)) != b"GGUF":
            found = f"{self.size} bytes" if self.size < 24 else f"a file that begins with {begin!r}"
            expected, hint = "a file that begins with GGUF", "give a complete .gguf file"
            raise InputError("not a GGUF file", expected=expected, found=found, where=self.path, hint=hint)
        version, n_tensors, n_fields = self.unpack("<IQQ")
        if version not in (2, 3):
            found = "a big-endian file" if version & 0xFFFF == 0 else version
            expected, hint = "2 or 3, little-endian", "convert the original model again with a current llama.cpp"
            raise InputError("unsupported version of GGUF", expected=expected, found=found, where=self.path, hint=hint)
        if max(n_tensors, n_fields) > LARGEST_COUNT:
            raise self.damage(f"{n_tensors} tensors and {n_fields} keys; no model has more than {LARGEST_COUNT}")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.text()
            if key in fields:
                raise self.damage(f"the key {key[:60]!r} occurs twice")
            fields[key] = self.value(*self.unpack("<I"))
        infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(n_tensors):
            name = self.text()
            if name in infos:
                raise self.damage(f"the tensor {name[:60]!r} occurs twice")
            (n_dims,) = self.unpack("<I")
            if not 1 <= n_dims <= 4:
                raise self.damage(f"{n_dims} dimensions of the tensor {name[:60]!r}")
            dims = self.unpack(f"<{n_dims}Q")
            infos[name] = (*self.unpack("<I"), dims[::-1], *self.unpack("<Q"))  # type, shape, offset
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.damage(f"an alignment of {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {name: self.place(name, *info, start, alignment) for name, info in infos.items()}
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise self.damage(f"{name[:60]!r} overlaps {before[:60]!r}")
            end, before = tensor.offset + tensor.n_bytes, name
        return GGUFFile(self.path, fields, tensors)

    def place(
        self, name: str, kind: int, shape: tuple[int, ...], offset: int, start: int, alignment: int
    ) -> GGUFTensor:
        try:
            block, block_bytes = _block_of(kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            expected = "F32, F16, BF16, or a quantised type that the `gguf` package can dequantise"
            found = f"{error} ({name[:60]})"
            problem, hint = "the type of a tensor is not known", "get the model in a different quantisation"
            raise InputError(problem, expected=expected, found=found, where=self.path, hint=hint) from error
        n_bytes, rest = divmod(math.prod(shape) * block_bytes, block)
        if 0 in shape or shape[-1] % block or rest:
            raise self.damage(f"a shape of {shape} for {name[:60]!r}, stored in blocks of {block}")
        if offset % alignment or offset + n_bytes > self.size - start:
            raise self.damage(f"{name[:60]!r}, of shape {shape} at byte {offset}, is not within the file")
        return GGUFTensor(kind, shape, start + offset, n_bytes)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.unpack("<IQ")
            if kind == STRING:
                return [self.text() for _ in range(count)]
            if kind not in SCALARS:
                raise self.damage(f"an array of type {kind}")
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind not in SCALARS:
            raise self.damage(f"a value of type {kind}")
        number = np.frombuffer(self.take(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0]
        if kind == 6 and abs(number) < 1 << 24:  # the intended decimal number: 1e-6 instead of 9.99999997e-7
            return float(str(number))
        return number.item()

    def text(self) -> str:
        return self.take(*self.unpack("<Q")).decode()

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > min(self.size, HEADER_BYTES) - self.at:
            raise self.damage("a header that ends after the file, or is longer than 64 MiB")
        self.at += n_bytes
        return self.file.read(n_bytes)

    def damage(self, found: str) -> InputError:
        return InputError("damaged GGUF file", found=found, where=self.path, hint="get the file again")
