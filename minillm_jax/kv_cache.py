"""The key/value cache: state in, state out, static shapes, one length per row.

Shapes: B batch, T new tokens, S capacity, K key/value heads, H head dim.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer, by position."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """One LayerCache per layer, and how many positions of each row are filled (int32). What lies beyond a row's length
    is never seen: a query at position p sees keys 0 to p, and p itself has just been written."""

    layers: tuple[LayerCache, ...]
    length_B: jax.Array

    @property
    def capacity(self) -> int:
        return self.layers[0].k_BSKH.shape[1]


def init_cache(config: ModelConfig, batch_size: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for up to `capacity` tokens per row; raises InputError if that is more than the context."""
    if capacity > config.context_length:
        raise InputError("the cache is longer than the context", expected=config.context_length, found=capacity)
    shape = (batch_size, capacity, config.n_kv_heads, config.resolved_head_dim)
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layers))
    return KVCache(layers, jnp.zeros(batch_size, jnp.int32))


def append(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, position_BT: jax.Array) -> LayerCache:
    """Writes keys and values at their positions, each row at its own."""
    row_B1 = jnp.arange(position_BT.shape[0])[:, None]
    return LayerCache(
        cache.k_BSKH.at[row_B1, position_BT].set(k_BTKH.astype(cache.k_BSKH.dtype), mode="drop"),
        cache.v_BSKH.at[row_B1, position_BT].set(v_BTKH.astype(cache.v_BSKH.dtype), mode="drop"),
    )


def check_room(cache: KVCache, n_tokens: int) -> None:
    """Raises InputError if a row has no room for `n_tokens` more. Under jit lengths are not known: check before."""
    if isinstance(cache.length_B, jax.core.Tracer):
        return
    longest = int(np.max(cache.length_B))
    if longest + n_tokens > cache.capacity:
        raise InputError(
            "the cache is full",
            expected=f"at most {cache.capacity} tokens",
            found=f"{longest} cached + {n_tokens} new",
            do="start with a larger capacity",
        )
