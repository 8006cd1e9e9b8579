"""Decoding on the device: prefill, sampling, and a compiled loop with a donated cache.

Shapes: B batch, T prompt positions, N tokens of a block, V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minillm_core.generation import BaseGenerator
from minillm_core.sampling import SamplingConfig
from minillm_core.tokenizer import Tokenizer
from minillm_jax.kv_cache import KVCache, init_cache
from minillm_jax.layers import at_least_float32
from minillm_jax.model import MiniLLM
from minillm_jax.weights import Params, merge_model, split_model

DecodeState = tuple[jax.Array, KVCache]
"""Logits (B, V) of the next token, and the cache of all before it."""


class Generator(BaseGenerator):
    """Generates text from a model; see BaseGenerator for `generate`, `generate_tokens` and `stream`."""

    def __init__(self, model: MiniLLM, tokenizer: Tokenizer):
        super().__init__(model, tokenizer)
        self._graphdef, self._params, self._rope = split_model(model)
        self._dtype = model.compute_dtype

    def _prefill(self, tokens_BT: np.ndarray, length_B: np.ndarray, capacity: int) -> DecodeState:
        cache = init_cache(self.config, len(tokens_BT), capacity, self._dtype)
        return _prefill(self._graphdef, self._params, self._rope, tokens_BT, length_B, cache)

    def _decode(
        self, state: DecodeState, uniforms_BN: np.ndarray, n_tokens: int, sampling: SamplingConfig
    ) -> tuple[np.ndarray, DecodeState]:
        filters = (float(sampling.temperature), min(sampling.top_k, self.config.vocab_size), float(sampling.top_p))
        greedy = sampling.temperature == 0
        tokens_BN, state = _decode(
            self._graphdef, greedy, self._params, self._rope, state, uniforms_BN, n_tokens, filters
        )
        return np.asarray(tokens_BN)[:, :n_tokens], state


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _prefill(
    graphdef: Any, params: Params, rope: Params, tokens_BT: jax.Array, length_B: jax.Array, cache: KVCache
) -> DecodeState:
    """Positions past a row's length hold padding; they are not visible, and decoding overwrites them."""
    model = merge_model(graphdef, params, rope)
    x_BTD, full_cache = model.model(tokens_BT, cache)
    assert full_cache is not None  # a cache went in
    last_B1D = jnp.take_along_axis(x_BTD, length_B[:, None, None] - 1, axis=1)
    return model.head(last_B1D)[:, 0], dataclasses.replace(full_cache, length_B=length_B)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(
    graphdef: Any,
    greedy: bool,
    params: Params,
    rope: Params,
    state: DecodeState,
    uniforms_BN: jax.Array,
    n_tokens: jax.Array,
    filters: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, DecodeState]:
    """Samples n_tokens tokens, one model step each; one compilation serves every count, temperature and filter."""
    model = merge_model(graphdef, params, rope)

    def body(i: jax.Array, carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        tokens_BN, (logits_BV, cache) = carry
        token_B = jnp.argmax(logits_BV, axis=-1) if greedy else sample(logits_BV, uniforms_BN[:, i], *filters)
        token_B = token_B.astype(jnp.int32)
        logits_BTV, cache_after = model(token_B[:, None], cache)
        assert cache_after is not None  # a cache went in
        return tokens_BN.at[:, i].set(token_B), (logits_BTV[:, 0], cache_after)

    return jax.lax.fori_loop(0, n_tokens, body, (jnp.zeros(uniforms_BN.shape, jnp.int32), state))


def sample(
    logits_BV: jax.Array, uniform_B: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """One token per row, by inverse CDF over the filtered distribution, in the order of token ids.

    Sorting only selects: were the CDF in the order of probability, rounding would swap near-equal tokens' places.

    Args:
        uniform_B: in [0, 1), one per row.
        temperature: above 0.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens that together have at least this probability.
    """
    logits_BV = logits_BV.astype(at_least_float32(logits_BV.dtype))
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    sorted_BV = jnp.where((top_k == 0) | (jnp.arange(sorted_BV.shape[-1]) < top_k), sorted_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    probs_BV = jnp.where((before_BV < top_p) | (before_BV == 0), probs_BV, 0.0)
    cdf_BV = jnp.cumsum(jnp.take_along_axis(probs_BV, rank_BV, axis=-1), axis=-1)
    return jnp.argmax(cdf_BV > uniform_B[:, None] * cdf_BV[:, -1:], axis=-1)
