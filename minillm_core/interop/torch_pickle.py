"""torch.save files, read without torch and without running any code that is in them.

This is the one file that knows the inside of Python's `pickle`; when that changes, importing it raises an InputError
that says so (and parity_tests/test_original.py fails with it).
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
    """A tensor of a torch.save file, which is read when asked for."""

    file: Path
    entry: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Raises InputError if the file is damaged or does not hold all of it."""
        try:
            with zipfile.ZipFile(self.file) as archive:
                data = np.frombuffer(archive.read(self.entry), numpy_dtype(self.dtype))
        except Exception as error:  # a damaged archive raises anything
            problem, hint = "missing or damaged checkpoint", "get the file again"
            raise InputError(problem, found=repr(error)[:200], where=self.file, hint=hint) from error
        end = self.offset + math.prod(self.shape)
        contiguous = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        if self.strides != contiguous or end > len(data):
            problem, expected = "not a tensor as the original saves it", "a contiguous tensor inside its storage"
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
    """Python's own implementation of pickle in Python, which is not public.

    Raises:
        InputError: this version of Python no longer has it, or has changed it.
    """
    found = vars(pickle).get("_Unpickler")
    missing: list[object] = [code for code in OPCODES if code[0] not in getattr(found, "dispatch", {})]
    missing += [name for name in ("load", "load_build", "load_setitem", "load_setitems") if not hasattr(found, name)]
    if missing:
        raise InputError(
            "this version of Python has a different pickle._Unpickler, so torch.save files cannot be read safely",
            expected="that of Python 3.11 to 3.14",
            found=f"Python {sys.version.split()[0]}, without {missing}",
            where=__name__,
            hint="give the folder of the model's safetensors, or use an earlier Python and report this",
        )
    return found


_PythonUnpickler: Any = _python_unpickler()


def _no_items() -> OrderedDict[str, Any]:
    """Stands for OrderedDict, whose items come after."""
    return OrderedDict()


class ModelArgs:
    """Stands for the original's dataclass: attributes, no code."""


class _Unpickler(_PythonUnpickler):
    """Knows tensors, dicts and the original's ModelArgs, and refuses every other name: no code can run.

    It is Python's own implementation, limited to what torch.save writes (protocol 2): the one in C takes an index of
    its memo for a size, so that five bytes ask for gigabytes.
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
            "the pickle asks for more than weights: it could run code, and is not read further",
            found=f"{module}.{name}",
            where=self._file,
            hint="do not trust this file",
        )

    def load_build(self) -> None:
        """Attributes for the original's dataclass alone: a tensor's would get past their checks."""
        state = self.stack.pop()
        if type(self.stack[-1]) is not ModelArgs or type(state) is not dict:
            raise ValueError("attributes of something else than ModelArgs")
        vars(self.stack[-1]).update(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        """Keys of dicts are names: the hash of nested tuples may take for ever."""
        self._check_names(self.stack[-2:])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self._check_names(self.stack)
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def _check_names(self, items: list[Any]) -> None:
        if not all(type(key) in (str, int) for key in items[::2]):
            raise ValueError("a dict whose keys are not names")

    def persistent_load(self, reference: Any) -> tuple[str, str]:
        _, dtype, key, _, _ = reference
        if dtype not in STORAGES.values() or type(key) is not str:
            raise ValueError("a storage of no such kind or name")
        return self._entries[f"data/{key}"], dtype

    def _tensor(self, storage: tuple[str, str], offset: int, shape: Any, strides: Any, *_: Any) -> PickledTensor:
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(x) is int and 0 <= x < 1 << 48 for x in numbers):
            raise ValueError("a tensor of no such shape, strides or offset")
        return PickledTensor(self._file, *storage, offset, tuple(shape), tuple(strides))


def read_pickled(path: Path) -> dict[str, Any]:
    """The content of a torch.save file with its tensors unread.

    Raises:
        InputError: missing, damaged, or it asks for anything but tensors, dicts and the original's ModelArgs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            if packed:
                problem, hint = "a compressed file, which torch.save does not write", "give the file as it was saved"
                raise InputError(problem, found=packed[0], where=path, hint=hint)
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = names[0].removesuffix("data.pkl")
            entries = {name.removeprefix(root): name for name in archive.namelist() if name.startswith(root)}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                hint = "save it again on a little-endian machine"
                raise InputError("a file of a big-endian machine", where=path, hint=hint)
            with archive.open(names[0]) as data:
                content = _Unpickler(data, path, entries).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        hint = "give the original's ckpt.pt, or the folder of its model.safetensors and config.json"
        raise InputError("missing or damaged checkpoint", found=repr(error)[:200], where=path, hint=hint) from error
    if not isinstance(content, dict):
        found, hint = type(content).__name__, "only the original's own checkpoints can be read"
        raise InputError("not the original's checkpoint", expected="a dict", found=found, where=path, hint=hint)
    return content
