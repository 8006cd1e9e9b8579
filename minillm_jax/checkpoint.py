"""Writes and reads the tensors of a checkpoint in framework-free form, and loads a checkpoint as a model.

Framework-free tensors are numpy arrays by canonical name. `minillm_core/training/checkpoints.py` commits, lists and
verifies checkpoints; payload.py knows the file formats.
"""

from pathlib import Path

import numpy as np

from minillm_core.config import ModelConfig, RunConfig
from minillm_core.model.params import check_shapes, count_params, read_weights
from minillm_core.progress import progress
from minillm_core.tensors import LazyTensors, Tensors, counted
from minillm_core.training.checkpoints import TrainingState, find_checkpoint, read_info, verify_checkpoint
from minillm_jax import payload
from minillm_jax.model import MiniLLM
from minillm_jax.precision import resolve_dtype
from minillm_jax.weights import build_model, canonical_name, change_layout, param_paths, to_framework

FRAMEWORK = "jax"


def write_payload(folder: Path, config: RunConfig, state: TrainingState) -> None:
    """Writes framework-free tensors, bit for bit; empty moment groups are omitted."""
    assert bool(state.exp_avg) == bool(state.exp_avg_sq)
    groups = {group: to_framework(config.model, tensors) for group, tensors in vars(state).items() if tensors}
    n_values = sum(array.size for tensors in groups.values() for array in tensors.values())
    with progress("writing the tensors", n_values, "value") as work:
        payload.start_writing(folder, config.model, groups, work.advance)()


def read_payload(checkpoint: Path, config: RunConfig) -> TrainingState:
    """A checkpoint's tensors, framework-free. An imported checkpoint has no moments: these groups are empty.

    Raises:
        InputError: the payload is missing or damaged, or its tensors do not match `config` (at most 20 are listed).
    """
    groups = ["weights", *(g for g in ("exp_avg", "exp_avg_sq") if payload.has_group(checkpoint, g))]
    opened = {group: _open_group(checkpoint, group, config) for group in groups}
    with progress("reading the tensors", len(groups) * count_params(config.model), "value") as work:
        read: dict[str, Tensors] = {group: counted(tensors.items(), work) for group, tensors in opened.items()}
    return TrainingState(read["weights"], read.get("exp_avg", {}), read.get("exp_avg_sq", {}))


def open_weights(checkpoint: Path, config: RunConfig) -> LazyTensors:
    """A checkpoint's weights, framework-free. Each tensor is read from disk when it is accessed.

    Raises:
        InputError: the payload is missing or damaged, or its tensors do not match `config` (at most 20 are listed).
    """
    return _open_group(checkpoint, "weights", config)


def _open_group(checkpoint: Path, group: str, config: RunConfig) -> LazyTensors:
    paths = param_paths(config.model)
    shapes = {
        canonical_name(path): change_layout(path, np.broadcast_to(0, shape)).shape
        for path, shape in payload.saved_shapes(checkpoint, group).items()
    }
    check_shapes(config.model, shapes, f"{checkpoint}, {group}")

    def read(name: str) -> np.ndarray:
        return change_layout(paths[name], payload.read_tensor(checkpoint, group, paths[name]))

    return LazyTensors(paths, read)


def load(path: str | Path, dtype: str = "float32") -> MiniLLM:
    """Loads the model of a checkpoint for inference.

    Args:
        path: one checkpoint folder; or a run (`runs/quickstart`) or its framework folder (`runs/quickstart/jax`),
            which means the newest checkpoint.
        dtype: dtype of parameters and computation: float32, bfloat16 or float64 (which enables JAX's 64-bit mode).

    Raises:
        InputError: there is no checkpoint of this framework, or it is damaged.
    """
    checkpoint = find_checkpoint(path, FRAMEWORK)
    verify_checkpoint(checkpoint)
    config = read_info(checkpoint).config
    return from_weights(config.model, read_weights(config.model, open_weights(checkpoint, config).items()), dtype)


def from_weights(config: ModelConfig, weights: Tensors, dtype: str = "float32") -> MiniLLM:
    """A model for inference with canonical weights, in the given dtype, on the default device.

    Raises:
        InputError: listing the missing, unexpected and misshapen tensors (at most 20).
    """
    compute_dtype = resolve_dtype(dtype)
    return build_model(config, weights, param_dtype=compute_dtype, compute_dtype=compute_dtype)
