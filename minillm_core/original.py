"""A checkpoint of the original Mini-LLM (github.com/Ashx098/Mini-LLM): its ckpt.pt, or its safetensors.

Its rotary embedding turns neighbouring channels, ours channel i with i + H/2: rows of q and k are reordered. Its table
of rotations is checked and left out. The model here is that of its uncached logits: its cached decoding masks the one
query top-left, so that it sees the first key alone.
"""

import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.interchange import checked_weight, numpy_dtype, read_tensor, safetensors_layout
from minillm_core.params import check_shapes, param_table
from minillm_core.rope import half_split, inverse_frequencies
from minillm_core.tokenizer import TOKENIZER_JSON, TOKENIZER_MODEL, copy_tokenizer

NAMES = {
    "model.embed_tokens": "tok_embeddings.emb",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "model.norm": "norm",
    "model.layers": "layers",
}
"""Part of a canonical name -> of the original's."""

HEAD, ROTATIONS = "output.weight", "rope.freqs_cis"

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
class OriginalCheckpoint:
    """A checkpoint that has been looked at, but whose weights have not been read."""

    folder: Path
    config: ModelConfig
    read: Callable[[str], np.ndarray]
    """The original's tensor of a name."""

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter by canonical name, one at a time: float64 as it is, smaller types as float32.

        Raises:
            InputError: numbers that are not finite, or what the original's tied head and constant buffer cannot be.
        """
        for name in param_table(self.config):
            array = checked_weight(self.read(original_name(name)), original_name(name), self.folder)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                array = half_split(array, self.config.resolved_head_dim)
            yield name, array

    def write_tokenizer(self, folder: Path) -> None:
        """Copies the tokenizer's files. Of a tokenizer.model and a tokenizer.json, which in the original give other
        ids, the second, with which it was trained."""
        copy_tokenizer(self.folder, folder)
        if (folder / TOKENIZER_JSON).is_file():
            (folder / TOKENIZER_MODEL).unlink(missing_ok=True)


def original_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `layers.3.attention.wq.weight`."""
    for ours, theirs in NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name)
    return name


def open_original(path: Path) -> OriginalCheckpoint:
    """Reads the configuration of a ckpt.pt, or of a folder with the original's model.safetensors and config.json, and
    compares every name and shape. Nothing that is in the pickle is executed.

    Raises:
        InputError: it is neither, or damaged, or another model.
    """
    if path.is_dir() and (path / "model.safetensors").is_file():
        file = path / "model.safetensors"
        shapes = {name: shape for name, (shape, _) in safetensors_layout(file).items()}
        arguments = _read_arguments(path / "config.json")

        def read(name: str) -> np.ndarray:
            return read_tensor(file, prefix + name)
    else:
        file = path / "ckpt.pt" if path.is_dir() else path
        pickled = read_pickled(file)
        tensors, arguments = pickled.get("model"), pickled.get("model_args")
        if not isinstance(tensors, Mapping) or not all(isinstance(x, PickledTensor) for x in tensors.values()):
            expected, do = "a dict with 'model' and 'model_args'", "only the original's own checkpoints can be read"
            raise InputError("not the original's checkpoint", expected=expected, where=file, do=do)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        arguments = vars(arguments) if isinstance(arguments, _ModelArgs) else arguments

        def read(name: str) -> np.ndarray:
            array: np.ndarray = tensors[prefix + name].read()
            return array

    prefix = "_orig_mod." if f"_orig_mod.{HEAD}" in shapes else ""  # of a compiled model
    config = _config(arguments, file)
    if config.n_layers > len(shapes):  # before tables of that size are made
        do = "get the file again"
        raise InputError("more layers than tensors", expected=f"{config.n_layers} layers", where=file, do=do)
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    back = {original_name(name): name for name in param_table(config)}
    constant = {name for name in (HEAD, ROTATIONS) if name in shapes}
    check_shapes(config, {back.get(n, n): shape for n, shape in shapes.items() if n not in constant}, file)
    if HEAD in constant and not np.array_equal(read(HEAD), read(original_name("model.embed_tokens.weight"))):
        do = "only the original's own checkpoints can be read"
        raise InputError("the head differs from the embedding, which the original ties", where=file, do=do)
    if ROTATIONS in constant:
        angles = np.arange(config.context_length)[:, None] * inverse_frequencies(config)
        found = read(ROTATIONS)
        if found.shape != angles.shape or not np.allclose(found, np.exp(1j * angles), atol=2e-3):
            do = "only the original's own checkpoints can be read"
            raise InputError("the rotations are not the original's", found=ROTATIONS, where=file, do=do)
    return OriginalCheckpoint(file.parent, config, read)


def _read_arguments(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        do = "put the original's config.json beside its model.safetensors"
        raise InputError("missing or damaged configuration", found=str(error)[:200], where=path, do=do) from error


def _config(arguments: Any, where: Path) -> ModelConfig:
    """The original's ModelArgs as a ModelConfig; theta and eps are constants of its code."""
    fields = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
    values: list[Any] = [arguments.get(field) for field in fields] if isinstance(arguments, dict) else [None]
    if not all(type(value) is int and 0 < value < 1 << 24 for value in values):
        expected, do = (
            f"whole numbers {fields}",
            "only the original's own checkpoints can be read ('hf->jax' reads others)",
        )
        kinds = [type(value).__name__ for value in values]  # what is in them may have no end
        raise InputError("not the original's model_args", expected=expected, found=kinds, where=where, do=do)
    dim, n_layers, n_heads, n_kv_heads, vocab_size, multiple_of, max_seq_len = values
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=max_seq_len,
        width=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        hidden=-(-4 * dim // multiple_of) * multiple_of,
        tie_embeddings=True,
        rope_theta=10_000.0,
        norm_eps=1e-6,
    )


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
            problem, do = "missing or damaged checkpoint", "get the file again"
            raise InputError(problem, found=repr(error)[:200], where=self.file, do=do) from error
        end = self.offset + math.prod(self.shape)
        contiguous = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        if self.strides != contiguous or end > len(data):
            problem, expected = "not a tensor as the original saves it", "a contiguous tensor inside its storage"
            do = "get the file again"
            raise InputError(problem, expected=expected, found=self.entry, where=self.file, do=do)
        return data[self.offset : end].reshape(self.shape)


_PythonUnpickler: Any = vars(pickle)["_Unpickler"]


def _no_items() -> OrderedDict[str, Any]:
    """Stands for OrderedDict, whose items come after."""
    return OrderedDict()


class _ModelArgs:
    """Stands for the original's dataclass: attributes, no code."""


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
            return _ModelArgs
        raise InputError(
            "the pickle asks for more than weights: it could run code, and is not read further",
            found=f"{module}.{name}",
            where=self._file,
            do="do not trust this file",
        )

    def load_build(self) -> None:
        """Attributes for the original's dataclass alone: a tensor's would get past their checks."""
        state = self.stack.pop()
        if type(self.stack[-1]) is not _ModelArgs or type(state) is not dict:
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
                problem, do = "a compressed file, which torch.save does not write", "give the file as it was saved"
                raise InputError(problem, found=packed[0], where=path, do=do)
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = names[0].removesuffix("data.pkl")
            entries = {name.removeprefix(root): name for name in archive.namelist() if name.startswith(root)}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                do = "save it again on a little-endian machine"
                raise InputError("a file of a big-endian machine", where=path, do=do)
            with archive.open(names[0]) as data:
                content = _Unpickler(data, path, entries).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        do = "give the original's ckpt.pt, or the folder of its model.safetensors and config.json"
        raise InputError("missing or damaged checkpoint", found=repr(error)[:200], where=path, do=do) from error
    if not isinstance(content, dict):
        found, do = type(content).__name__, "only the original's own checkpoints can be read"
        raise InputError("not the original's checkpoint", expected="a dict", found=found, where=path, do=do)
    return content
