"""Decoding on the device: prefill, sampling, and a compiled loop with a donated cache.

Shapes: B rows, T prompt tokens, N tokens per block, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig
from minillm_core.data.batches import Batch
from minillm_core.decoding.generation import BaseGenerator
from minillm_core.decoding.sampling import Filters
from minillm_core.text.tokenizer import Tokenizer
from minillm_jax.device import target_device
from minillm_jax.kv_cache import KVCache, init_cache, only_rows, put_row, take_rows
from minillm_jax.loss import make_eval_step, token_losses
from minillm_jax.model import MiniLLM
from minillm_jax.precision import at_least_float32
from minillm_jax.weights import Params, merge_model, split_model

DecodeState = tuple[jax.Array, KVCache]
"""Logits (B, V) for the next token, and the cache of all tokens before it."""


class Generator(BaseGenerator):
    """Generates and scores text; see BaseGenerator for `generate`, `stream`, `prefill` and `score`."""

    def __init__(self, model: MiniLLM, tokenizer: Tokenizer):
        super().__init__(model, tokenizer)
        self._dtype = model.compute_dtype
        self._eval_step = make_eval_step(model)
        graphdef, self._params, self._rope = split_model(model)
        self._run_prefill = jit_prefill(graphdef, target_device())
        self._run_prefill_logits = jit_prefill_logits(graphdef, target_device())
        self._one_row = self._several_rows = self._params
        if target_device().platform == "cpu":
            graphdef, self._one_row, self._several_rows = _laid_out_for_cpu(self.config, self._params, self._dtype)
        self._run_decode = jit_decode(graphdef, target_device())

    def _new_state(self, n_rows: int, capacity: int) -> DecodeState:
        return new_state(self.config, n_rows, capacity, self._dtype)

    def _take_rows(self, state: DecodeState, rows_B: np.ndarray, capacity: int) -> DecodeState:
        return _take_rows(state, rows_B, capacity)

    def _put_row(self, state: DecodeState, row: int, one_row: DecodeState) -> DecodeState:
        return _put_row(state, row, one_row)

    def _next_logits(self, state: DecodeState, row: int) -> np.ndarray:
        return np.asarray(state[0][row].astype(at_least_float32(self._dtype)))

    def _prefill(self, state: DecodeState, tokens_BT: np.ndarray, valid_B: np.ndarray) -> DecodeState:
        return self._run_prefill(self._params, self._rope, state, tokens_BT, valid_B)

    def _prefill_logits(
        self, state: DecodeState, tokens_BT: np.ndarray, valid_B: np.ndarray
    ) -> tuple[np.ndarray, DecodeState]:
        logits_BTV, state = self._run_prefill_logits(self._params, self._rope, state, tokens_BT, valid_B)
        return np.asarray(logits_BTV.astype(at_least_float32(self._dtype))), state

    def _decode(
        self,
        state: DecodeState,
        seen_BV: np.ndarray,
        uniforms_BN: np.ndarray,
        active_B: np.ndarray,
        n_tokens: int,
        filters: Filters,
        *,
        greedy: bool,
    ) -> tuple[np.ndarray, np.ndarray, DecodeState]:
        params = self._one_row if len(seen_BV) == 1 else self._several_rows
        tokens_BN, logprobs_BN, state = self._run_decode(
            greedy, params, self._rope, state, seen_BV, uniforms_BN, active_B, n_tokens, filters
        )
        return np.asarray(tokens_BN)[:, :n_tokens], np.asarray(logprobs_BN)[:, :n_tokens], state

    def _losses(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._eval_step(Batch.from_rows(rows)))


def _laid_out_for_cpu(
    config: ModelConfig, params: Params, compute_dtype: DTypeLike
) -> tuple[nnx.GraphDef[MiniLLM], Params, Params]:
    """The same model with a Linear as its output head: structure, parameters for one row, parameters for several rows.

    XLA:CPU reads a kernel faster as (out, in) for one row and as (in, out) for several, so there is a second copy of
    all kernels. Measured with mini-llm-50m on two cores of an AMD EPYC: one row decodes 203 tokens/s from (out, in)
    kernels and 178 from (in, out).
    """
    untied = dataclasses.replace(config, tie_embeddings=False)
    dtypes = {"param_dtype": params["model.norm.scale"].dtype, "compute_dtype": compute_dtype}
    graphdef, _, _ = split_model(nnx.eval_shape(lambda: MiniLLM(untied, **dtypes)))
    one_row, several_rows = _turned(params), dict(params)
    if config.tie_embeddings:
        one_row["lm_head.kernel"] = params["model.embed_tokens.embedding"]
        several_rows["lm_head.kernel"] = params["model.embed_tokens.embedding"].T
    return graphdef, one_row, several_rows


def _turned(params: Params) -> Params:
    """Transposes all kernels: from (in, out) to (out, in), or back."""
    return {path: array.T if path.endswith(".kernel") else array for path, array in params.items()}


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def new_state(config: ModelConfig, n_rows: int, capacity: int, dtype: DTypeLike) -> DecodeState:
    """The decoding state of empty rows."""
    return jnp.zeros((n_rows, config.vocab_size), dtype), init_cache(config, n_rows, capacity, dtype)


@partial(jax.jit, static_argnums=2)
def _take_rows(state: DecodeState, rows_B: jax.Array, capacity: int) -> DecodeState:
    logits_BV, cache = state
    return logits_BV[rows_B], take_rows(cache, rows_B, capacity)


@partial(jax.jit, donate_argnums=0)
def _put_row(state: DecodeState, row: int, one_row: DecodeState) -> DecodeState:
    logits_BV, cache = state
    logits_1V, one = one_row
    return logits_BV.at[row].set(logits_1V[0]), put_row(cache, row, one)


@lru_cache
def jit_prefill(graphdef: Any, device: jax.Device) -> Callable[..., DecodeState]:
    """`_prefill` bound to a model structure: hashing it at every call would take longer than a small step. What it
    traces depends on the device."""
    return jax.jit(partial(_prefill, graphdef), donate_argnums=2)


@lru_cache
def jit_prefill_logits(graphdef: Any, device: jax.Device) -> Callable[..., tuple[jax.Array, DecodeState]]:
    """`_prefill_logits` bound to a model structure and a device."""
    return jax.jit(partial(_prefill_logits, graphdef), donate_argnums=2)


@lru_cache
def jit_decode(graphdef: Any, device: jax.Device) -> Callable[..., Any]:
    """`_decode` bound to a model structure and a device."""
    on_cpu = device.platform == "cpu"
    # YNN, XLA:CPU's default library for matrix products, computes small ones on one core; Eigen uses all cores.
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if on_cpu else None
    return jax.jit(partial(_decode, graphdef, on_cpu), static_argnums=0, donate_argnums=3, compiler_options=options)


def _prefill(
    graphdef: Any, params: Params, rope: Params, state: DecodeState, tokens_BT: jax.Array, valid_B: jax.Array
) -> DecodeState:
    model = merge_model(graphdef, params, rope)
    logits_BV, cache = state
    x_BTD, cache_after = model.model(tokens_BT, cache, valid_B)
    assert cache_after is not None  # because a cache was passed in
    last_B1D = jnp.take_along_axis(x_BTD, jnp.maximum(valid_B - 1, 0)[:, None, None], axis=1)
    return jnp.where((valid_B > 0)[:, None], model.head(last_B1D)[:, 0], logits_BV), cache_after


def _prefill_logits(
    graphdef: Any, params: Params, rope: Params, state: DecodeState, tokens_BT: jax.Array, valid_B: jax.Array
) -> tuple[jax.Array, DecodeState]:
    model = merge_model(graphdef, params, rope)
    logits_BV, cache = state
    x_BTD, cache_after = model.model(tokens_BT, cache, valid_B)
    assert cache_after is not None  # because a cache was passed in
    logits_BTV = model.head(x_BTD)
    last_B1V = jnp.take_along_axis(logits_BTV, jnp.maximum(valid_B - 1, 0)[:, None, None], axis=1)
    return logits_BTV, (jnp.where((valid_B > 0)[:, None], last_B1V[:, 0], logits_BV), cache_after)


def _decode(
    graphdef: Any,
    on_cpu: bool,
    greedy: bool,
    params: Params,
    rope: Params,
    state: DecodeState,
    seen_BV: jax.Array,
    uniforms_BN: jax.Array,
    active_B: jax.Array,
    n_tokens: jax.Array,
    filters: Filters,
) -> tuple[jax.Array, jax.Array, DecodeState]:
    """Samples n_tokens tokens, one model step each. One compilation serves all values of n_tokens and the filters."""
    B, N = uniforms_BN.shape
    valid_B = active_B.astype(jnp.int32)
    rows_B = jnp.arange(B)
    turned = B == 1 and on_cpu

    def body(i: jax.Array, carry: Any) -> Any:
        # Inside the loop, transposing only changes how XLA reads the kernels; outside, XLA would copy them.
        model = merge_model(graphdef, _turned(params) if turned else params, rope)
        tokens_BN, logprobs_BN, seen_BV, (logits_BV, cache) = carry
        filtered_BV = filter_logits(logits_BV, seen_BV, filters, greedy=greedy)
        token_B = largest(filtered_BV)
        if not greedy:
            token_B = jnp.where(filters.greedy_B, token_B, draw(filtered_BV, uniforms_BN[:, i]))
        logprob_B = -token_losses(logits_BV, token_B)
        logits_BTV, cache_after = model(token_B[:, None], cache, valid_B)
        assert cache_after is not None  # because a cache was passed in
        return (
            tokens_BN.at[:, i].set(token_B),
            logprobs_BN.at[:, i].set(logprob_B),
            seen_BV.at[rows_B, token_B].set(True),
            (logits_BTV[:, 0], cache_after),
        )

    empty = (jnp.zeros((B, N), jnp.int32), jnp.zeros((B, N), at_least_float32(state[0].dtype)))
    state = state[0], only_rows(state[1], active_B)
    tokens_BN, logprobs_BN, _, state = jax.lax.fori_loop(0, n_tokens, body, (*empty, seen_BV, state))
    return tokens_BN, logprobs_BN, state


def filter_logits(logits_BV: jax.Array, seen_BV: jax.Array, filters: Filters, *, greedy: bool) -> jax.Array:
    """The logits (B, V) to sample from, up to a constant per row, in at least float32. Dropped tokens have -inf.

    Args:
        seen_BV: bool; the tokens that repetition_penalty applies to.
        greedy: apply only the penalty; the most likely token passes all other filters anyway.
    """
    logits_BV = logits_BV.astype(at_least_float32(logits_BV.dtype))
    penalty_B1, temperature_B1, top_p_B1, log_min_p_B1 = (
        x.astype(logits_BV.dtype)
        for x in (filters.repetition_penalty_B1, filters.temperature_B1, filters.top_p_B1, filters.log_min_p_B1)
    )
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if greedy:
        return logits_BV
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B1

    def keep_top_k(logits_BV: jax.Array) -> jax.Array:
        return _drop(logits_BV, jnp.ones_like(logits_BV), filters.top_k_B1)

    def keep_top_p(logits_BV: jax.Array) -> jax.Array:
        return _drop(logits_BV, jax.nn.softmax(logits_BV, axis=-1), top_p_B1)

    logits_BV = jax.lax.cond(jnp.any(filters.top_k_B1 < logits_BV.shape[1]), keep_top_k, lambda x: x, logits_BV)
    logits_BV = jax.lax.cond(jnp.any(top_p_B1 < 1), keep_top_p, lambda x: x, logits_BV)
    return jnp.where(logits_BV < log_min_p_B1, -jnp.inf, logits_BV)


def _drop(logits_BV: jax.Array, weights_BV: jax.Array, limit_B1: jax.Array) -> jax.Array:
    """Drops every token for which the weights of all larger logits sum to the row's limit or more.

    The threshold is found by bisection over all numbers of the dtype, mapped to integers in the same order. The result
    is exact and needs no sorting (for 32,000 logits, XLA:CPU takes 7 ms to sort and 0.5 ms to bisect).
    """
    int_dtype = jnp.dtype(f"int{8 * logits_BV.dtype.itemsize}")
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, int_dtype)
    ordered_BV = jnp.where(bits_BV < 0, bits_BV ^ jnp.iinfo(int_dtype).max, bits_BV)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = bounds  # always dropped, always kept
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)
        above_B1 = jnp.sum(jnp.where(ordered_BV > middle_B1, weights_BV, 0), axis=-1, keepdims=True)
        kept_B1 = above_B1 < limit_B1
        return jnp.where(kept_B1, low_B1, middle_B1), jnp.where(kept_B1, middle_B1, high_B1)

    shape = (logits_BV.shape[0], 1)
    bounds = (
        jnp.full(shape, jnp.iinfo(int_dtype).min, int_dtype),
        jnp.full(shape, jnp.iinfo(int_dtype).max, int_dtype),
    )
    low_B1, _ = jax.lax.fori_loop(0, 8 * logits_BV.dtype.itemsize, halve, bounds)
    return jnp.where(ordered_BV > low_B1, logits_BV, -jnp.inf)


def draw(logits_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Draws one token per row by inverse CDF, in the order of token ids; never a token of probability zero.

    In the order of probability, rounding could swap two tokens of nearly equal probability.

    Args:
        uniform_B: one number in [0, 1) per row.
    """
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    # XLA's cumsum adds in a tree; its rounding may raise the sum even at a dropped token. Those are set to 0.
    cdf_BV = jnp.where(probs_BV > 0, jnp.cumsum(probs_BV, axis=-1), 0)
    return largest(cdf_BV > uniform_B[:, None] * jnp.max(cdf_BV, axis=-1, keepdims=True))


def largest(x_BV: jax.Array) -> jax.Array:
    """Index of the first largest value of every row, int32. XLA:CPU's argmax, over pairs, takes 5 times as long."""
    index_V = jnp.arange(x_BV.shape[1], dtype=jnp.int32)
    return jnp.min(jnp.where(x_BV == jnp.max(x_BV, axis=-1, keepdims=True), index_V, x_BV.shape[1] - 1), axis=-1)
