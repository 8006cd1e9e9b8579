"""Token files of other projects, which are trained on as they are: train.bin and val.bin in one folder.

Alone, they hold 16-bit ids without a header, as those of nanoGPT and of the original Mini-LLM. With train.idx and
val.idx, they are indexed datasets of Megatron-LM.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.errors import InputError
from minillm_core.text.tokenizer import hash_tokenizer

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's number of a type -> the type."""
WHOLE_BYTES = 4 << 30
"""Larger files are identified by their size and both ends."""
END_BYTES = 64 << 20


def foreign_index(folder: Path, splits: tuple[str, ...], vocab_size: int) -> dict[str, Any] | None:
    """The index of a folder with the token files of another project; None if it has none.

    Raises:
        InputError: a file is damaged, or the files have different types.
    """
    files = {split: folder / f"{split}.bin" for split in splits}
    if not all(path.is_file() for path in files.values()):
        return None
    found = {split: _described(path) for split, path in files.items()}
    dtypes = {dtype for dtype, _ in found.values()}
    if len(dtypes) > 1:
        listed = ", ".join(f"{split}: {dtype}" for split, (dtype, _) in found.items())
        raise InputError("the token files have different types", found=listed, where=folder)
    return {
        "format_version": 0,
        "vocab_size": vocab_size,
        "dtype": dtypes.pop(),
        "tokenizer_sha256": hash_tokenizer(folder),
        **{split: described for split, (_, described) in found.items()},
    }


def _described(path: Path) -> tuple[str, dict[str, Any]]:
    """The type of the ids of a file, and its entry in an index."""
    size = path.stat().st_size
    index = path.with_suffix(".idx")
    dtype, n_tokens, n_documents = _megatron(index) if index.is_file() else ("<u2", size // 2, None)
    if size != n_tokens * np.dtype(dtype).itemsize or not n_tokens:
        expected = f"{n_tokens} ids of {np.dtype(dtype).itemsize} bytes" if n_tokens else "token ids"
        raise InputError("damaged token file", expected=expected, found=f"{size} bytes", where=path)
    shard = {"name": path.name, "n_tokens": n_tokens, "sha256": identity(path)}
    entry: dict[str, Any] = {"n_tokens": n_tokens, "n_bytes": None, "shards": [shard]}
    return dtype, entry if n_documents is None else entry | {"n_documents": n_documents}


def _megatron(path: Path) -> tuple[str, int, int]:
    """Type, tokens and documents of an .idx file."""
    try:
        with path.open("rb") as file:
            if file.read(9) != MAGIC:
                raise ValueError("not an index of Megatron-LM")
            version, code, n_sequences, n_bounds = struct.unpack("<QBQQ", file.read(25))
            if version != 1 or code not in DTYPES:
                raise ValueError(f"version {version}, type {code}")
            sizes = np.fromfile(file, "<i4", n_sequences)
            if len(sizes) != n_sequences or path.stat().st_size < 34 + 12 * n_sequences + 8 * n_bounds:
                raise ValueError("truncated")
    except (ValueError, struct.error) as error:
        hint = "get the file again"
        raise InputError("damaged index of tokens", found=error, where=path, hint=hint) from error
    return DTYPES[code], int(sizes.sum(dtype=np.int64)), n_bounds - 1


def identity(path: Path) -> str:
    """SHA-256 of a file; of a very large one, of its size and both ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size}\n".encode() + file.read(END_BYTES))
        file.seek(size - END_BYTES)
        digest.update(file.read())
        return digest.hexdigest()
