"""Converts canonical weights to a model and back. One table of leaf names serves weights, gradients and Adam moments.

Example of a framework path: `model.layers.0.self_attn.q_proj.kernel`. The canonical name differs only in its last word.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig
from minillm_core.model.params import check_shapes, param_table
from minillm_core.model.rope import rope_table
from minillm_core.tensors import Tensors
from minillm_jax.model import MiniLLM, RopeTable, abstract_model

SUFFIXES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "kernel": ("weight", np.transpose),
    "embedding": ("weight", np.asarray),
    "scale": ("weight", np.asarray),
}
"""Leaf name -> canonical leaf name, and the change of layout, which is its own inverse."""

Params = dict[str, Any]
"""Parameters, gradients or moments by framework path: a flat pytree, cheap to pass to a jitted function."""

LAYER = re.compile(r"(?<=^model\.layers\.)(\d+)\.")
"""The number of a layer in a path. With `scan_layers`, all layers share a path without it, and an array (L, ...)."""


def canonical_name(path: str) -> str:
    """`...q_proj.kernel` -> `...q_proj.weight`; a path with an unknown leaf name stays the same."""
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
    tensors = {canonical_name(path): change_layout(path, np.asarray(array)) for path, array in params.items()}
    check_shapes(config, {name: array.shape for name, array in tensors.items()}, "the given tensors")
    return {name: tensors[name] for name in param_table(config)}


def to_framework(config: ModelConfig, tensors: Tensors) -> dict[str, np.ndarray]:
    """The inverse of `to_canonical`, in numpy, without copies if the layout allows it.

    Raises:
        InputError: listing the missing, unexpected and misshapen tensors (at most 20).
    """
    check_shapes(config, {name: array.shape for name, array in tensors.items()}, "the given tensors")
    return {path: change_layout(path, tensors[name]) for name, path in param_paths(config).items()}


def from_canonical(config: ModelConfig, tensors: Tensors, dtype: DTypeLike, *, scan_layers: bool = False) -> Params:
    """Like `to_framework`, but as arrays on the default device that share no memory with `tensors`."""
    arrays = to_framework(config, tensors)
    if scan_layers:
        arrays = stack_layers(arrays)
    return {path: jnp.array(array, dtype) for path, array in arrays.items()}


def stack_layers(arrays: Mapping[str, Any], stack: Callable[[list[Any]], Any] = np.stack) -> dict[str, Any]:
    """Arrays of one layer each -> arrays of all layers, (L, ...), as a model with `scan_layers` has them."""
    stacked: dict[str, dict[int, Any]] = {}
    for path, array in arrays.items():
        layer = LAYER.search(path)
        stacked.setdefault(LAYER.sub("", path), {})[int(layer[1]) if layer else -1] = array
    return {
        path: layers[-1] if -1 in layers else stack([layers[i] for i in range(len(layers))])
        for path, layers in stacked.items()
    }


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`, where the arrays are. Arrays of one layer each stay as they are."""
    unstacked: Params = {}
    for path, array in params.items():
        rest = path.removeprefix("model.layers.")
        if rest == path or LAYER.search(path):
            unstacked[path] = array
        else:
            unstacked |= {f"model.layers.{i}.{rest}": array[i] for i in range(len(array))}
    return unstacked


def _abstract_paths(config: ModelConfig) -> list[str]:
    return list(_flatten(nnx.state(abstract_model(config), nnx.Param)))


def change_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Converts an array from the framework's layout to the canonical one, or back; an unknown leaf stays as it is."""
    leaf = path.rpartition(".")[2]
    return SUFFIXES[leaf][1](array) if leaf in SUFFIXES else array


def build_model(config: ModelConfig, tensors: Tensors, *, param_dtype: DTypeLike, compute_dtype: DTypeLike) -> MiniLLM:
    """A model with the given canonical weights, on the default device.

    Raises:
        InputError: listing the missing, unexpected and misshapen tensors (at most 20).
    """
    graphdef, rope = model_structure(config, param_dtype=param_dtype, compute_dtype=compute_dtype)
    return merge_model(graphdef, from_canonical(config, tensors, param_dtype), rope)


def model_structure(
    config: ModelConfig, *, param_dtype: DTypeLike, compute_dtype: DTypeLike, scan_layers: bool = False
) -> tuple[nnx.GraphDef[MiniLLM], Params]:
    """A model's static structure and its constants, without its parameters."""
    dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
    abstract = nnx.eval_shape(lambda: MiniLLM(config, **dtypes, scan_layers=scan_layers))
    graphdef, _, rope = split_model(abstract)
    tables = zip(("model.cos_SH", "model.sin_SH"), rope_table(config), strict=True)
    return graphdef, {path: jnp.asarray(table, rope[path].dtype) for path, table in tables}


def split_model(model: MiniLLM) -> tuple[nnx.GraphDef[MiniLLM], Params, Params]:
    """Splits a model into its static structure, parameters and constants: plain pytrees for jitted functions."""
    graphdef, state = nnx.split(model)
    params, rope = nnx.split_state(state, nnx.Param, RopeTable)
    return graphdef, _flatten(params), _flatten(rope)


def merge_model(graphdef: nnx.GraphDef[MiniLLM], params: Params, rope: Params) -> MiniLLM:
    """The inverse of `split_model`; also works under jit."""
    items = [
        (tuple(int(key) if key.isdecimal() else key for key in path.split(".")), array)
        for path, array in (params | rope).items()
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(items))


def _flatten(state: nnx.State) -> Params:
    return {".".join(map(str, keys)): variable.get_value() for keys, variable in nnx.to_flat_state(state)}
