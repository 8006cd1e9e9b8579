"""The tensors of a checkpoint, framework-free: written, read, loaded as a model.

core's checkpoints.py commits, lists and verifies checkpoints; payload.py knows the files.
"""

from pathlib import Path

import numpy as np

from minillm_core.config import RunConfig
from minillm_core.model.params import check_shapes
from minillm_core.tensors import LazyTensors, Tensors
from minillm_core.training.checkpoints import TrainingState, find_checkpoint, read_info, verify_checkpoint
from minillm_torch import payload
from minillm_torch.device import default_device
from minillm_torch.model import MiniLLM
from minillm_torch.precision import resolve_dtype
from minillm_torch.weights import build_model, canonical_name, change_layout, param_paths, to_framework

FRAMEWORK = "torch"


def write_payload(folder: Path, config: RunConfig, state: TrainingState) -> None:
    """Writes framework-free tensors, bit for bit; an empty moment group is left out."""
    groups = {group: to_framework(config.model, tensors) for group, tensors in vars(state).items() if tensors}
    payload.start_writing(folder, config.model, groups)()


def read_payload(checkpoint: Path, config: RunConfig) -> TrainingState:
    """A checkpoint's tensors, framework-free; an imported checkpoint has no moments.

    Raises:
        InputError: the payload is missing or damaged, or does not fit `config`; every differing tensor is named.
    """

    def read(group: str) -> Tensors:
        return dict(_open_group(checkpoint, group, config)) if payload.has_group(checkpoint, group) else {}

    weights = dict(open_weights(checkpoint, config))
    return TrainingState(weights, read("exp_avg"), read("exp_avg_sq"))


def open_weights(checkpoint: Path, config: RunConfig) -> LazyTensors:
    """A checkpoint's weights, framework-free, each read when it is asked for.

    Raises:
        InputError: the payload is missing or damaged, or does not fit `config`; every differing tensor is named.
    """
    return _open_group(checkpoint, "weights", config)


def _open_group(checkpoint: Path, group: str, config: RunConfig) -> LazyTensors:
    paths = param_paths(config.model)
    shapes = {
        canonical_name(path): change_layout(path, np.broadcast_to(0, shape)).shape
        for path, shape in payload.saved_shapes(checkpoint, group).items()
    }
    check_shapes(config.model, shapes, checkpoint)

    def read(name: str) -> np.ndarray:
        return change_layout(paths[name], payload.read_tensor(checkpoint, group, paths[name]))

    return LazyTensors(paths, read)


def load(path: str | Path, dtype: str = "float32") -> MiniLLM:
    """Loads the model of a checkpoint for inference.

    Args:
        path: a run (`runs/quickstart`) or its framework folder (`runs/quickstart/torch`): the newest checkpoint; or one
            checkpoint folder.
        dtype: of parameters and computation: float32, bfloat16 or float64.

    Raises:
        InputError: there is no checkpoint of this framework, or it is damaged.
    """
    checkpoint = find_checkpoint(path, FRAMEWORK)
    verify_checkpoint(checkpoint)
    config = read_info(checkpoint).config
    weights = dict(open_weights(checkpoint, config))
    compute_dtype = resolve_dtype(dtype)
    model = build_model(
        config.model, weights, param_dtype=compute_dtype, compute_dtype=compute_dtype, device=default_device()
    )
    return model.requires_grad_(False)
