"""Decoding on the device: prefill, sampling, and a compiled loop with a donated cache.

Shapes: B rows, T prompt tokens, N tokens per block, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
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
from minillm_jax.sampling import draw, filter_logits, largest
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
        self._run_decode, self._several_rows = jit_decode(graphdef, target_device()), self._params
        untied = untied_structure(self.config, self._params["model.norm.scale"].dtype, self._dtype)
        self._run_decode_one = jit_decode(untied, target_device())
        if target_device().platform == "cpu":
            self._run_decode, self._several_rows = self._run_decode_one, with_head(self.config, self._params)

    @cached_property
    def _one_row(self) -> Params:
        """The parameters for a single row: a second copy of all kernels, made when they are first needed."""
        return for_one_row(self.config, self._params)

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
        has_penalty = (filters.repetition_penalty_B1 != 1).any()
        seen: Any = seen_BV if has_penalty else _none_seen(seen_BV.shape)
        one = len(seen_BV) == 1
        run, params = (self._run_decode_one, self._one_row) if one else (self._run_decode, self._several_rows)
        tokens_BN, logprobs_BN, state = run(
            greedy, params, self._rope, state, seen, uniforms_BN, active_B, n_tokens, filters
        )
        return np.asarray(tokens_BN)[:, :n_tokens], np.asarray(logprobs_BN)[:, :n_tokens], state

    def _losses(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._eval_step(Batch.from_rows(rows)))


def untied_structure(config: ModelConfig, param_dtype: DTypeLike, compute_dtype: DTypeLike) -> nnx.GraphDef[MiniLLM]:
    """The structure of the same model with a Linear as its output head, for `with_head` and `for_one_row`."""
    untied = dataclasses.replace(config, tie_embeddings=False)
    dtypes: Any = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
    return split_model(nnx.eval_shape(lambda: MiniLLM(untied, **dtypes)))[0]


def with_head(config: ModelConfig, params: Params) -> Params:
    """The parameters with a kernel (D, V) of the output head, which XLA:CPU reads faster than the embedding (V, D)."""
    head = {"lm_head.kernel": params["model.embed_tokens.embedding"].T} if config.tie_embeddings else {}
    return params | head


def for_one_row(config: ModelConfig, params: Params) -> Params:
    """The parameters with all kernels as (out, in), the head's too. XLA reads them faster so for one row, but not for
    several.

    Measured with mini-llm-50m: on two cores of an AMD EPYC one row decodes 203 tokens/s from (out, in) kernels and 178
    from (in, out). On a GPU, XLA multiplies one row with an (in, out) kernel in two steps, and writes the products of
    all elements to memory in between.
    """
    head = {"lm_head.kernel": params["model.embed_tokens.embedding"]} if config.tie_embeddings else {}
    return _turned(params) | head


def _turned(params: Params) -> Params:
    """Transposes all kernels: from (in, out) to (out, in), or back."""
    return {path: array.T if path.endswith(".kernel") else array for path, array in params.items()}


@lru_cache(maxsize=8)
def _none_seen(shape: tuple[int, int]) -> jax.Array:
    """All false, on the device: 8 MB for 256 rows, which need not be sent there for every block of tokens."""
    return jnp.zeros(shape, bool)


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
    # YNN, XLA:CPU's default library for matrix products, computes small ones on one core; Eigen uses all cores.
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if device.platform == "cpu" else None
    return jax.jit(partial(_decode, graphdef), static_argnums=0, donate_argnums=3, compiler_options=options)


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
    """Samples n_tokens tokens, one model step each. One compilation serves all values of n_tokens and the filters.

    Args:
        graphdef, params: of `for_one_row` if there is one row.
    """
    B, N = uniforms_BN.shape
    valid_B = active_B.astype(jnp.int32)
    rows_B = jnp.arange(B)

    def body(i: jax.Array, carry: Any) -> Any:
        # Inside the loop, transposing only changes how XLA reads the kernels; outside, XLA would copy them.
        model = merge_model(graphdef, _turned(params) if B == 1 else params, rope)
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
