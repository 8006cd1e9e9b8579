"""The tensors of a checkpoint on disk: Orbax pytrees, by framework path.

    orbax/weights/      the parameters
    orbax/optimizer/    exp_avg and exp_avg_sq, absent in a checkpoint that has only weights

Only this file knows how Orbax lays out a checkpoint. Arrays are read with tensorstore, one chunk at a time: Orbax
itself reads all chunks at once and needs half an array more memory. If Orbax changes its layout,
`parity_tests/test_payload.py` fails and says so.
"""

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.files import real_path
from minillm_core.progress import ignore

FILE_BYTES, CHUNK_BYTES = 1 << 24, 1 << 22
"""Orbax starts a new file after FILE_BYTES (by default, it first collects 2 GB in memory) and a new chunk of an array
after CHUNK_BYTES."""

_LOCATIONS = {
    "weights": ("weights", ()),
    "exp_avg": ("optimizer", ("exp_avg",)),
    "exp_avg_sq": ("optimizer", ("exp_avg_sq",)),
}
"""Group of tensors -> the pytree that holds it, and the keys that lead to it."""


class _NumpyHandler(ocp.type_handlers.NumpyHandler):
    """Writes numpy arrays. They come from conversions, which wait for the write to end: Orbax needs no second copy of
    all of them."""

    def __init__(self, advance: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._advance = advance

    async def _open_and_write(self, value: np.ndarray, *how: Any, **more: Any) -> None:
        await super()._open_and_write(value, *how, **more)
        self._advance(value.size)


def start_writing(
    folder: Path,
    config: ModelConfig,
    groups: Mapping[str, Mapping[str, Any]],
    advance: Callable[[int], None] = ignore,
) -> Callable[[], None]:
    """Copies tensors off the device and starts writing them; the returned function waits until they are written.

    Args:
        groups: `weights` and, if training is to resume from it, `exp_avg` and `exp_avg_sq`; each by framework path.
        advance: called with the number of values that were written, if the tensors are numpy arrays.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (np.ndarray, _NumpyHandler(advance))
    )
    trees: dict[str, dict[str, Any]] = {}
    for group, tensors in groups.items():
        tree, keys = _LOCATIONS[group]
        node = trees.setdefault(tree, {})
        for key in keys:
            node = node.setdefault(key, {})
        node.update(tensors)
    items = {
        name: ocp.args.PyTreeSave(
            tree,
            save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree),
            ocdbt_target_data_file_size=FILE_BYTES,
        )
        for name, tree in trees.items()
    }
    handlers = {name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for name in items}
    checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
    with ExitStack() as stack:
        plain = stack.enter_context(_plain_path(folder))
        checkpointer.save(plain / "orbax", args=ocp.args.Composite(**items))
        until_written = stack.pop_all()

    def finish() -> None:
        with until_written:
            checkpointer.close()
        for group, tensors in groups.items():
            read_tensor(folder, group, next(iter(tensors)))

    return finish


def has_group(checkpoint: Path, group: str) -> bool:
    """Whether a checkpoint has `weights`, `exp_avg` or `exp_avg_sq`."""
    return (checkpoint / _tree(group)).is_dir()


def saved_shapes(checkpoint: Path, group: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a group, by framework path; no tensor is read.

    Raises:
        InputError: the group is missing or damaged.
    """
    with _damage_named(checkpoint / _tree(group)), _plain_path(checkpoint) as plain:
        # Not through a Checkpointer, which would look for a file of its own and warn.
        node = ocp.PyTreeCheckpointHandler().metadata(plain / _tree(group)).tree
        for key in _LOCATIONS[group][1]:
            if more := sorted(node.keys() - _LOCATIONS.keys()):
                raise ValueError(f"unknown groups of tensors: {more}")
            node = node[key]
        return {path: tuple(entry.shape) for path, entry in node.items()}


def read_tensor(checkpoint: Path, group: str, path: str) -> np.ndarray:
    """One tensor of a group; it does not matter from which devices it was saved.

    Raises:
        InputError: it is missing or damaged.
    """
    name = ".".join((*_LOCATIONS[group][1], path))
    with _damage_named(checkpoint / _tree(group)), _plain_path(checkpoint) as plain:
        base = {"driver": "file", "path": f"{plain / _tree(group)}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
        stored: Any = tensorstore.open(spec, open=True, read=True).result()
        array = np.empty(stored.shape, stored.dtype.numpy_dtype)
        grid = list(zip(stored.shape, stored.chunk_layout.read_chunk.shape, strict=True))
        for corner in itertools.product(*(range(0, size, step) for size, step in grid)):
            chunk = tuple(slice(at, min(at + step, size)) for at, (size, step) in zip(corner, grid, strict=True))
            array[chunk] = stored[chunk].read().result()
        return array


def _tree(group: str) -> Path:
    """The folder of a group of tensors, relative to its checkpoint."""
    return Path("orbax") / _LOCATIONS[group][0]


@contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """Yields a path of an existing folder that Orbax and tensorstore take as the operating system does.

    They shorten `a/link/..` to `a`, read `*`, `?`, `[` and `]` as a pattern and a backslash as a separator, and need
    UTF-8. If the absolute path has such characters, a temporary symbolic link stands for it.
    """
    resolved = real_path(folder)
    if not _is_odd(str(resolved)):
        yield resolved
        return
    with tempfile.TemporaryDirectory() as links:
        if _is_odd(links):
            problem = "Orbax cannot use such a path, nor a link to it in the folder for temporary files"
            raise InputError(problem, found=links, where=folder, hint="set TMPDIR to a folder with a plain name")
        link = Path(links) / "folder"
        link.symlink_to(resolved)
        yield link


def _is_odd(path: str) -> bool:
    """Whether Orbax or tensorstore could take a path for a different one."""
    return bool(re.search(r"[\\*?\[\]]", path)) or os.fsencode(path) != path.encode("utf-8", "backslashreplace")


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    if not (folder / "manifest.ocdbt").is_file():  # after such an error, Orbax's threads print tracebacks of their own
        hint = "use a different checkpoint of the run"
        raise InputError("missing or damaged Orbax tree", expected="manifest.ocdbt", where=folder, hint=hint)
    try:
        yield
    except (ValueError, OSError, KeyError, AttributeError) as error:
        hint = "use a different checkpoint of the run"
        raise InputError("missing or damaged Orbax tree", found=error, where=folder, hint=hint) from error
