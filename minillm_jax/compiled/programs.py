"""The package's own train step, prefill and decode step, compiled for a card and measured. No array is allocated."""

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from minillm_core.config import RunConfig
from minillm_core.data.batches import Batch
from minillm_core.decoding.generation import BLOCK, PREFILL_CHUNK
from minillm_core.decoding.sampling import Filters, SamplingConfig
from minillm_jax.compiled.card import card_device, standing_in_for
from minillm_jax.compiled.hlo import read_costs
from minillm_jax.generate import for_one_row, jit_decode, jit_prefill, new_state, untied_structure
from minillm_jax.model import abstract_model
from minillm_jax.optim import make_optimizer
from minillm_jax.precision import param_dtype, resolve_dtype
from minillm_jax.train import TrainState, jit_train_step
from minillm_jax.weights import model_structure, split_model, stack_layers

OPTIONS = {"xla_gpu_autotune_level": 0}
"""Without a GPU there is nothing to time kernels on, so XLA takes its default ones."""


@dataclass(frozen=True)
class Program:
    """What one compiled program costs per call. A loop counts as often as it runs, if XLA knows how often."""

    arguments_bytes: int
    """Memory of the arguments: weights, Adam moments, cache, tokens."""
    temporaries_bytes: int
    """Memory that the program needs besides its arguments."""
    moved_bytes: int
    """What all kernels together read and write, if no cache helps."""
    kernels: int
    """Kernels, copies and library calls that are launched."""
    fused_attention_calls: int
    """Calls of cuDNN's attention, which never stores the scores."""
    hlo: str = field(repr=False)
    """The program, as XLA's text."""


@dataclass(frozen=True)
class Programs:
    """The programs of a configuration."""

    train_step: Program
    """One optimizer step, with all its micro-batches."""
    prefill: Program
    """The first PREFILL_CHUNK tokens of one prompt, with a cache for `train.seq_len` tokens."""
    decode_step: Program
    """One sampled token of one row with such a cache, and what is done once per block of tokens."""


def compile_programs(config: RunConfig, card: str) -> Programs:
    """Compiles the programs of a configuration for a card that this machine does not need to have.

    Args:
        card: a name in CARDS.

    Raises:
        InputError: an unknown card, or JAX's CUDA compiler is not installed or was not loaded.
    """
    return Programs(compile_train_step(config, card), compile_prefill(config, card), compile_decode_step(config, card))


def compile_train_step(config: RunConfig, card: str) -> Program:
    """Like `compile_programs`, for the train step alone."""
    device = card_device(card)
    with standing_in_for(device):
        step, rope = jit_train_step(config)
        params = _params(config, param_dtype(resolve_dtype(config.train.compute_dtype)))
        if config.train.scan_layers:
            params = jax.eval_shape(partial(stack_layers, stack=jnp.stack), params)
        state = TrainState(params, jax.eval_shape(make_optimizer(config.optim, config.model).init, params))
        shape = (config.train.batch_size, config.train.seq_len)
        ids_BT, weights_BT = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
        batch = Batch(ids_BT, ids_BT, weights_BT)
        return _compile(step, device, state, rope, batch, config.optim.learning_rate)


def compile_prefill(config: RunConfig, card: str) -> Program:
    """Like `compile_programs`, for the prefill alone."""
    device = card_device(card)
    with standing_in_for(device):
        graphdef, *arguments = _decoding(config)
        tokens_BT = jax.ShapeDtypeStruct((1, min(PREFILL_CHUNK, config.train.seq_len)), jnp.int32)
        valid_B = jax.ShapeDtypeStruct((1,), jnp.int32)
        return _compile(jit_prefill(graphdef, device), device, *arguments, tokens_BT, valid_B)


def compile_decode_step(config: RunConfig, card: str) -> Program:
    """Like `compile_programs`, for the decode step alone."""
    device = card_device(card)
    with standing_in_for(device):
        _, params, rope, state = _decoding(config)
        dtype = resolve_dtype(config.train.compute_dtype)
        graphdef = untied_structure(config.model, dtype, dtype)
        params = jax.eval_shape(partial(for_one_row, config.model), params)
        seen_BV = jax.ShapeDtypeStruct((1, config.model.vocab_size), jnp.bool)
        uniforms_BN = jax.ShapeDtypeStruct((1, BLOCK), jnp.float32)
        active_B = jax.ShapeDtypeStruct((1,), jnp.bool)
        filters, greedy = Filters.of([SamplingConfig()], config.model.vocab_size), False
        arguments = (params, rope, state, seen_BV, uniforms_BN, active_B, BLOCK, filters)
        return _compile(jit_decode(graphdef, device), device, *arguments, static=(greedy,))


def _decoding(config: RunConfig) -> tuple[Any, Any, Any, Any]:
    """The model's structure, parameters, constants and the empty state of one row."""
    dtype = resolve_dtype(config.train.compute_dtype)
    graphdef, rope = model_structure(config.model, param_dtype=dtype, compute_dtype=dtype)
    state = jax.eval_shape(lambda: new_state(config.model, 1, config.train.seq_len, dtype))
    return graphdef, _params(config, dtype), rope, state


def _params(config: RunConfig, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    _, params, _ = split_model(abstract_model(config.model))
    return {path: jax.ShapeDtypeStruct(param.shape, dtype) for path, param in params.items()}


def _compile(function: Any, device: jax.Device, *arguments: Any, static: tuple[Any, ...] = ()) -> Program:
    """Compiles a jitted function for these arguments, each of them an array, a shape, or a number."""
    here = jax.sharding.SingleDeviceSharding(device)

    def placed(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) if hasattr(x, "shape") else x

    with warnings.catch_warnings():
        # JAX's persistent cache, if it is on, stores such a program and cannot load it, so it is compiled again.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry", UserWarning)
        compiled = function.lower(*static, *jax.tree.map(placed, arguments)).compile(OPTIONS)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    costs = read_costs(hlo)
    return Program(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        costs.moved_bytes,
        costs.kernels,
        costs.fused_attention_calls,
        hlo,
    )
