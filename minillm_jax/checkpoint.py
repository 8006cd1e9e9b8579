"""The payload of a checkpoint: two Orbax pytrees, `weights` and `optimizer`, by framework path.

core's checkpoints.py commits, lists and verifies; here tensors are written and read.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from minillm_core.checkpoints import LazyTensors, TrainingState, find_checkpoint, read_info, verify_checkpoint
from minillm_core.config import RunConfig
from minillm_core.errors import InputError
from minillm_core.params import check_shapes
from minillm_jax.model import MiniLLM
from minillm_jax.train import TrainState, resolve_dtype
from minillm_jax.weights import build_model, canonical_name, change_layout, param_paths, to_canonical, to_framework

FRAMEWORK = "jax"

FILE_BYTES, CHUNK_BYTES = 1 << 24, 1 << 22
"""After so much Orbax begins another file (by default it gathers 2 GB in memory first), another chunk of an array."""

_TYPE_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler()),
    # numpy arrays come from conversions, which wait for the end: without this Orbax holds a second copy of them all
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
)


def start_payload(folder: Path, config: RunConfig, state: TrainState) -> Callable[[], None]:
    """Copies the state off the device and starts writing it; the returned function waits for the end."""
    adam = state.opt_state[0]
    return _start(folder, state.params, adam.mu, adam.nu)


def write_payload(folder: Path, config: RunConfig, state: TrainingState) -> None:
    """Writes framework-free tensors, bit for bit; an empty moment group is left out."""
    weights, exp_avg, exp_avg_sq = (
        to_framework(config.model, tensors) if tensors else {}
        for tensors in (state.weights, state.exp_avg, state.exp_avg_sq)
    )
    _start(folder, weights, exp_avg, exp_avg_sq)()


def _start(
    folder: Path, weights: Mapping[str, Any], exp_avg: Mapping[str, Any], exp_avg_sq: Mapping[str, Any]
) -> Callable[[], None]:
    trees = {"weights": dict(weights)}
    if exp_avg:
        trees["optimizer"] = {"exp_avg": dict(exp_avg), "exp_avg_sq": dict(exp_avg_sq)}
    items = {
        name: ocp.args.PyTreeSave(
            tree,
            save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree),
            ocdbt_target_data_file_size=FILE_BYTES,
        )
        for name, tree in trees.items()
    }
    handlers = {name: ocp.PyTreeCheckpointHandler(type_handler_registry=_TYPE_HANDLERS) for name in items}
    checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
    checkpointer.save(folder.absolute() / "orbax", args=ocp.args.Composite(**items))
    return checkpointer.close


def read_payload(checkpoint: Path, config: RunConfig) -> TrainingState:
    """A checkpoint's tensors, framework-free; of an imported one there are no moments.

    Raises:
        InputError: the payload is missing or damaged, or does not fit `config`, every differing tensor named.
    """
    folder = checkpoint.absolute() / "orbax"
    weights = to_canonical(config.model, _restore(folder / "weights"))
    if not (folder / "optimizer").is_dir():
        return TrainingState(weights, {}, {})
    adam = _restore(folder / "optimizer")
    exp_avg, exp_avg_sq = (to_canonical(config.model, adam[name]) for name in ("exp_avg", "exp_avg_sq"))
    return TrainingState(weights, exp_avg, exp_avg_sq)


def open_weights(checkpoint: Path, config: RunConfig) -> LazyTensors:
    """A checkpoint's weights, framework-free, each read when it is asked for.

    Raises:
        InputError: the payload is missing or damaged, or does not fit `config`, every differing tensor named.
    """
    folder, paths = checkpoint.absolute() / "orbax" / "weights", param_paths(config.model)
    with _damage_named(folder):
        saved = {path: entry.shape for path, entry in _saved_tree(folder).items()}
    shapes = {canonical_name(p): change_layout(p, np.broadcast_to(0, shape)).shape for p, shape in saved.items()}
    check_shapes(config.model, shapes, checkpoint)

    def read(name: str) -> np.ndarray:
        with _damage_named(folder):
            return change_layout(paths[name], _read(folder, paths[name]))

    return LazyTensors(paths, read)


def _restore(folder: Path) -> Any:
    """A saved pytree as numpy arrays, whatever devices it was saved from."""
    with _damage_named(folder):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: _read(folder, ".".join(entry.key for entry in path)), _saved_tree(folder)
        )


def _read(folder: Path, name: str) -> np.ndarray:
    """One array of a saved pytree, a chunk at a time: Orbax has all chunks under way at once, and half an array more
    in memory."""
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    stored: Any = tensorstore.open(spec, open=True, read=True).result()
    array = np.empty(stored.shape, stored.dtype.numpy_dtype)
    grid = list(zip(stored.shape, stored.chunk_layout.read_chunk.shape, strict=True))
    for corner in itertools.product(*(range(0, size, step) for size, step in grid)):
        chunk = tuple(slice(at, min(at + step, size)) for at, (size, step) in zip(corner, grid, strict=True))
        array[chunk] = stored[chunk].read().result()
    return array


def _saved_tree(folder: Path) -> Any:
    """What there is of every array but its numbers. (A Checkpointer would look for a file of its own, and warn.)"""
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise InputError(
            "missing or damaged Orbax tree", found=error, where=folder, do="use another checkpoint of the run"
        ) from error


def load(path: str | Path, dtype: str = "float32") -> MiniLLM:
    """Loads the model of a checkpoint for inference.

    Args:
        path: a run (`runs/quickstart`), its framework folder (`runs/quickstart/jax`): the newest checkpoint; or one
            checkpoint folder.
        dtype: of parameters and computation: float32, bfloat16 or float64 (which enables JAX's 64-bit mode).

    Raises:
        InputError: there is no checkpoint of this framework, or it is damaged.
    """
    checkpoint = find_checkpoint(path, FRAMEWORK)
    verify_checkpoint(checkpoint)
    config = read_info(checkpoint).config
    weights = dict(open_weights(checkpoint, config))
    compute_dtype = resolve_dtype(dtype)
    return build_model(config.model, weights, param_dtype=compute_dtype, compute_dtype=compute_dtype)
