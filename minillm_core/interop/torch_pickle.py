"""Reads torch.save files without torch, and without running any code in them.

This is the only file that depends on the internals of Python's `pickle`. If they change, importing this module raises
an InputError that says so, and parity_tests/test_original.py fails.
"""

import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from minillm_core.errors import InputError
from minillm_core.interop.safetensors_files import numpy_dtype

STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
}


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a torch.save file. It is read only when it is requested."""

    file: Path
    entry: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Reads the tensor. Raises InputError if the file is damaged or does not contain the whole tensor."""
        try:
            with zipfile.ZipFile(self.file) as archive:
                data = np.frombuffer(archive.read(self.entry), numpy_dtype(self.dtype))
        except Exception as error:  # a damaged archive can raise any exception
            problem, hint = "missing or damaged checkpoint", "get the file again"
            raise InputError(problem, found=repr(error)[:200], where=self.file, hint=hint) from error
        end = self.offset + math.prod(self.shape)
        contiguous = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        if self.strides != contiguous or end > len(data):
            problem, expected = "unsupported layout of a tensor", "a contiguous tensor inside its storage"
            hint = "get the file again"
            raise InputError(problem, expected=expected, found=self.entry, where=self.file, hint=hint)
        return data[self.offset : end].reshape(self.shape)


OPCODES = (
    pickle.PROTO,
    pickle.STOP,
    pickle.MARK,
    pickle.NONE,
    pickle.NEWTRUE,
    pickle.NEWFALSE,
    pickle.BININT,
    pickle.BININT1,
    pickle.BININT2,
    pickle.LONG1,
    pickle.BINFLOAT,
    pickle.BINUNICODE,
    pickle.EMPTY_DICT,
    pickle.EMPTY_LIST,
    pickle.EMPTY_TUPLE,
    pickle.TUPLE,
    pickle.TUPLE1,
    pickle.TUPLE2,
    pickle.TUPLE3,
    pickle.APPEND,
    pickle.APPENDS,
    pickle.SETITEM,
    pickle.SETITEMS,
    pickle.BINGET,
    pickle.LONG_BINGET,
    pickle.BINPUT,
    pickle.LONG_BINPUT,
    pickle.GLOBAL,
    pickle.REDUCE,
    pickle.NEWOBJ,
    pickle.BUILD,
    pickle.BINPERSID,
)


def _python_unpickler() -> Any:
    """The unpickler of the standard library that is written in Python. It is not public.

    Raises:
        InputError: this version of Python does not have it, or has changed it.
    """
    found = vars(pickle).get("_Unpickler")
    missing: list[object] = [code for code in OPCODES if code[0] not in getattr(found, "dispatch", {})]
    missing += [name for name in ("load", "load_build", "load_setitem", "load_setitems") if not hasattr(found, name)]
    if missing:
        raise InputError(
            "this version of Python has a different pickle._Unpickler, so torch.save files cannot be read safely",
            expected="the one of Python 3.11 and 3.12",
            found=f"Python {sys.version.split()[0]}, without {missing}",
            where=__name__,
            hint="give the folder with the model's safetensors, or use an earlier Python, and report this problem",
        )
    return found


_PythonUnpickler: Any = _python_unpickler()


def _no_items() -> OrderedDict[str, Any]:
    """Replaces OrderedDict in the pickle. Its items are set afterwards."""
    return OrderedDict()


class ModelArgs:
    """Replaces the original's dataclass: only attributes, no code."""


class _Unpickler(_PythonUnpickler):
    """Accepts tensors, dicts and the original's ModelArgs, and refuses all other names, so that no code can run.

    It is the standard library's Python implementation, limited to the opcodes that torch.save writes (protocol 2). The
    C implementation is not used: it allocates its memo by the largest index, so five bytes can request gigabytes.
    """

    dispatch: ClassVar[dict[int, Any]] = {code[0]: _PythonUnpickler.dispatch[code[0]] for code in OPCODES}

    def __init__(self, data: Any, file: Path, entries: dict[str, str]):
        super().__init__(data)
        self._file, self._entries = file, entries

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return _no_items
        if (module, name) == ("model.config", "ModelArgs"):
            return ModelArgs
        raise InputError(
            "the pickle contains more than weights: it could run code, so it is not read",
            found=f"{module}.{name}",
            where=self._file,
            hint="do not trust this file",
        )

    def load_build(self) -> None:
        """Sets attributes of ModelArgs only. Attributes of a tensor would bypass its checks."""
        state = self.stack.pop()
        if type(self.stack[-1]) is not ModelArgs or type(state) is not dict:
            raise ValueError("attributes of an object that is not ModelArgs")
        vars(self.stack[-1]).update(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        """Accepts only strings and integers as keys: hashing deeply nested tuples could take forever."""
        self._check_names(self.stack[-2:])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self._check_names(self.stack)
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def _check_names(self, items: list[Any]) -> None:
        if not all(type(key) in (str, int) for key in items[::2]):
            raise ValueError("a dict whose keys are not strings or integers")

    def persistent_load(self, reference: Any) -> tuple[str, str]:
        _, dtype, key, _, _ = reference
        if dtype not in STORAGES.values() or type(key) is not str:
            raise ValueError("a storage of an unknown kind or name")
        return self._entries[f"data/{key}"], dtype

    def _tensor(self, storage: tuple[str, str], offset: int, shape: Any, strides: Any, *_: Any) -> PickledTensor:
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(x) is int and 0 <= x < 1 << 48 for x in numbers):
            raise ValueError("a tensor with an impossible shape, strides or offset")
        return PickledTensor(self._file, *storage, offset, tuple(shape), tuple(strides))


def read_pickled(path: Path) -> dict[str, Any]:
    """The content of a torch.save file. Its tensors are not read yet.

    Raises:
        InputError: the file is missing or damaged, or contains anything except tensors, dicts and the original's
            ModelArgs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            if packed:
                problem, hint = (
                    "the file is compressed, but torch.save writes uncompressed files",
                    "give the original file",
                )
                raise InputError(problem, found=packed[0], where=path, hint=hint)
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = names[0].removesuffix("data.pkl")
            entries = {name.removeprefix(root): name for name in archive.namelist() if name.startswith(root)}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                hint = "save it again on a little-endian machine"
                raise InputError("the file was written on a big-endian machine", where=path, hint=hint)
            with archive.open(names[0]) as data:
                content = _Unpickler(data, path, entries).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        hint = "give the original's ckpt.pt, or the folder with its model.safetensors and config.json"
        raise InputError("missing or damaged checkpoint", found=repr(error)[:200], where=path, hint=hint) from error
    if not isinstance(content, dict):
        found, hint = type(content).__name__, "use a checkpoint saved by the original Mini-LLM"
        raise InputError(
            "not a checkpoint of the original Mini-LLM", expected="a dict", found=found, where=path, hint=hint
        )
    return content
