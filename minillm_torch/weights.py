"""Converts canonical weights to a model and back. One table of leaf names serves weights, gradients and Adam moments.

Example of a framework path: `model.layers.0.self_attn.q_proj.weight`. It equals the canonical name.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from minillm_core.config import ModelConfig
from minillm_core.model.params import check_shapes, param_table
from minillm_core.model.rope import rope_table
from minillm_core.tensors import Tensors
from minillm_torch.model import MiniLLM, RopeTable, abstract_model

SUFFIXES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "weight": ("weight", np.asarray),
}
"""Leaf name -> canonical leaf name, and the change of layout, which is its own inverse."""

Params = dict[str, Any]
"""Parameters, gradients or moments by framework path."""


def canonical_name(path: str) -> str:
    """The path itself: in torch, framework paths and canonical names are equal."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{SUFFIXES[leaf][0]}" if leaf in SUFFIXES else path


@lru_cache
def param_paths(config: ModelConfig) -> dict[str, str]:
    """Framework path of every parameter, by canonical name, in the order of core's parameter table."""
    paths = {canonical_name(path): path for path in _abstract_paths(config)}
    return {name: paths[name] for name in param_table(config)}


def to_canonical(config: ModelConfig, params: Mapping[str, Any]) -> Tensors:
    """Parameters, gradients or moments by framework path -> numpy arrays by canonical name.

    Raises:
        InputError: listing the missing, unexpected and misshapen tensors (at most 20).
    """
    tensors = {canonical_name(path): change_layout(path, _to_numpy(array)) for path, array in params.items()}
    check_shapes(config, {name: array.shape for name, array in tensors.items()}, "the given tensors")
    return {name: tensors[name] for name in param_table(config)}


def to_framework(config: ModelConfig, tensors: Tensors) -> dict[str, np.ndarray]:
    """The inverse of `to_canonical`, in numpy, without copies if the layout allows it.

    Raises:
        InputError: listing the missing, unexpected and misshapen tensors (at most 20).
    """
    check_shapes(config, {name: array.shape for name, array in tensors.items()}, "the given tensors")
    return {path: change_layout(path, tensors[name]) for name, path in param_paths(config).items()}


def from_canonical(
    config: ModelConfig, tensors: Tensors, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Params:
    """Like `to_framework`, but as tensors on a device that share no memory with `tensors`."""
    return {
        path: torch.tensor(array, dtype=dtype, device=device) for path, array in to_framework(config, tensors).items()
    }


def _abstract_paths(config: ModelConfig) -> list[str]:
    return [path for path, _ in abstract_model(config).named_parameters()]


def change_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Converts an array from the framework's layout to the canonical one, or back; an unknown leaf stays as it is."""
    leaf = path.rpartition(".")[2]
    return SUFFIXES[leaf][1](array) if leaf in SUFFIXES else array


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def build_model(
    config: ModelConfig,
    tensors: Tensors,
    *,
    param_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> MiniLLM:
    """A model with the given canonical weights, on a device.

    Raises:
        InputError: listing the missing, unexpected and misshapen tensors (at most 20).
    """
    with torch.device("meta"):
        model = MiniLLM(config, param_dtype=param_dtype, compute_dtype=compute_dtype)
    cos_SH, sin_SH = (torch.tensor(table, dtype=model.model.cos_SH.dtype) for table in rope_table(config))
    model.model.cos_SH = RopeTable(cos_SH.to(device), persistent=False)
    model.model.sin_SH = RopeTable(sin_SH.to(device), persistent=False)
    params = from_canonical(config, tensors, param_dtype, device)
    model.load_state_dict({path: nn.Parameter(tensor) for path, tensor in params.items()}, assign=True)
    return model
