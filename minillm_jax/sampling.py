"""Sampling: filters of the logits, and the draw of a token.

Shapes: B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp

from minillm_core.decoding.sampling import Filters
from minillm_jax.device import target_device
from minillm_jax.precision import at_least_float32


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

    The threshold is found digit by digit, over all numbers of the dtype, mapped to integers in the same order. The
    result is exact and needs no sorting (for 32,000 logits, XLA:CPU takes 7 ms to sort and 0.5 ms for this).
    """
    int_dtype = jnp.dtype(f"int{8 * logits_BV.dtype.itemsize}")
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, int_dtype)
    ordered_BV = jnp.where(bits_BV < 0, bits_BV ^ jnp.iinfo(int_dtype).max, bits_BV)
    n_bits = digit_bits(len(logits_BV))
    digits_D = jnp.arange(1, 1 << n_bits, dtype=int_dtype)  # D: all digits but 0

    def add_digit(i: jax.Array, low_B1: jax.Array) -> jax.Array:
        shift = (jnp.iinfo(int_dtype).bits - n_bits - n_bits * i).astype(int_dtype)
        at_BD1 = (low_B1 + (digits_D << shift))[:, :, None]
        above_BD = jnp.sum(jnp.where(ordered_BV[:, None] > at_BD1, weights_BV[:, None], 0), axis=-1)
        n_dropped_B1 = jnp.sum(above_BD >= limit_B1, axis=-1, keepdims=True, dtype=int_dtype)
        return low_B1 + (n_dropped_B1 << shift)

    low_B1 = jnp.full((len(logits_BV), 1), jnp.iinfo(int_dtype).min, int_dtype)  # the largest number that is dropped
    low_B1 = jax.lax.fori_loop(0, jnp.iinfo(int_dtype).bits // n_bits, add_digit, low_B1)
    return jnp.where(ordered_BV > low_B1, logits_BV, -jnp.inf)


def digit_bits(n_rows: int) -> int:
    """Bits of the threshold that `_drop` finds per pass over the logits. On a GPU with few rows, starting a kernel
    takes longer than its work, so fewer and larger passes are faster."""
    return 4 if target_device().platform == "gpu" and n_rows <= 16 else 1


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
