"""The key/value cache: passed in and returned, with static shapes and one length per row.

Shapes: B batch, T new tokens, S capacity, K key/value heads, H head dim.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_jax.device import target_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer, by index in the row."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """One LayerCache per layer, and the number of filled indices in each row (int32). Indices beyond a row's length
    are never read: a query at index i sees no key after i, and key i has just been written."""

    layers: tuple[LayerCache, ...]
    length_B: jax.Array
    segments_BS: jax.Array | None = None
    """The document of every key (int32), if several documents share a row."""

    @property
    def capacity(self) -> int:
        return self.layers[0].k_BKSH.shape[2]


def init_cache(
    config: ModelConfig, batch_size: int, capacity: int, dtype: DTypeLike, segments: bool = False
) -> KVCache:
    """An empty cache for up to `capacity` tokens per row; raises InputError if that exceeds the context length.

    Args:
        segments: several documents may share a row; every call must then give `segments_BT`.
    """
    if capacity > config.context_length:
        raise InputError("the cache is longer than the context", expected=config.context_length, found=capacity)
    shape = (batch_size, config.n_kv_heads, capacity, config.resolved_head_dim)
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layers))
    segments_BS = jnp.zeros((batch_size, capacity), jnp.int32) if segments else None
    return KVCache(layers, jnp.zeros(batch_size, jnp.int32), segments_BS)


Slots = tuple[jax.Array, jax.Array, jax.Array]
"""Indices of rows, heads and indices; together they broadcast to (B, T, K)."""


def slots(cache: KVCache, index_BT: jax.Array) -> Slots:
    """Where the keys and values (B, T, K, H) of the tokens at these indices of the rows go in every layer.

    The heads are indexed one by one: XLA:CPU would turn a single index into an update of a copy of the cache.
    """
    B, K, _, _ = cache.layers[0].k_BKSH.shape
    return jnp.arange(B)[:, None, None], jnp.arange(K)[None, None], index_BT[:, :, None]


def append(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, slots: Slots) -> LayerCache:
    """Writes keys and values into their slots; every row has its own indices. Indices outside the cache are ignored."""
    put = _put_one if k_BTKH.shape[:2] == (1, 1) and target_device().platform == "gpu" else _put
    return LayerCache(put(cache.k_BKSH, k_BTKH, slots), put(cache.v_BKSH, v_BTKH, slots))


def _put(x_BKSH: jax.Array, new_BTKH: jax.Array, slots: Slots) -> jax.Array:
    return x_BKSH.at[slots].set(new_BTKH.astype(x_BKSH.dtype), mode="drop")


def _put_one(x_1KSH: jax.Array, new_11KH: jax.Array, slots: Slots) -> jax.Array:
    """`_put` for one token of one row on a GPU, without a scatter, which takes 5.5 us on an H200. On a CPU, XLA would
    copy the cache."""
    index = slots[2][0, 0, 0]
    new_1K1H = new_11KH.transpose(0, 2, 1, 3).astype(x_1KSH.dtype)
    old_1K1H = jax.lax.dynamic_slice_in_dim(x_1KSH, index, 1, axis=2)
    new_1K1H = jnp.where(index < x_1KSH.shape[2], new_1K1H, old_1K1H)  # an index outside is moved to the last slot
    return jax.lax.dynamic_update_slice_in_dim(x_1KSH, new_1K1H, index, axis=2)


def append_segments(cache: KVCache, segments_BT: jax.Array | None, index_BT: jax.Array) -> KVCache:
    """The cache with the segments of new tokens at these indices of the rows; itself if it has no segments."""
    if segments_BT is None:
        return cache
    assert cache.segments_BS is not None  # both or neither: `check_room`
    rows_B1 = jnp.arange(len(segments_BT))[:, None]
    segments_BS = cache.segments_BS.at[rows_B1, index_BT].set(segments_BT, mode="drop")
    return KVCache(cache.layers, cache.length_B, segments_BS)


def take_rows(cache: KVCache, rows_B: jax.Array, capacity: int) -> KVCache:
    """A new cache with the given rows, in the given order (rows may repeat), cut or extended to `capacity`, which must
    have room for their tokens. The given cache does not change."""
    n_kept = min(cache.capacity, capacity)

    def take(x_BKSH: jax.Array) -> jax.Array:
        _, K, _, H = x_BKSH.shape
        new_BKSH = jnp.zeros((len(rows_B), K, capacity, H), x_BKSH.dtype)
        return new_BKSH.at[:, :, :n_kept].set(x_BKSH[rows_B, :, :n_kept])

    layers = tuple(LayerCache(take(layer.k_BKSH), take(layer.v_BKSH)) for layer in cache.layers)
    segments_BS = cache.segments_BS
    if segments_BS is not None:
        segments_BS = jnp.zeros((len(rows_B), capacity), jnp.int32).at[:, :n_kept].set(segments_BS[rows_B, :n_kept])
    return KVCache(layers, cache.length_B[rows_B], segments_BS)


def put_row(cache: KVCache, row: int, one: KVCache) -> KVCache:
    """The cache with one of its rows replaced by the only row of `one`, a cache of the same capacity."""
    layers = tuple(
        LayerCache(layer.k_BKSH.at[row].set(new.k_BKSH[0]), layer.v_BKSH.at[row].set(new.v_BKSH[0]))
        for layer, new in zip(cache.layers, one.layers, strict=True)
    )
    segments_BS = cache.segments_BS
    if segments_BS is not None and one.segments_BS is not None:
        segments_BS = segments_BS.at[row].set(one.segments_BS[0])
    return KVCache(layers, cache.length_B.at[row].set(one.length_B[0]), segments_BS)


def only_rows(cache: KVCache, active_B: jax.Array) -> KVCache:
    """The cache with all other rows empty."""
    return KVCache(cache.layers, jnp.where(active_B, cache.length_B, 0), cache.segments_BS)


def check_room(cache: KVCache, tokens_BT: jax.Array, valid_B: jax.Array | None, segments_BT: jax.Array | None) -> None:
    """Raises InputError if the number of rows differs from the cache's, if a row has no room for T more tokens, if
    valid_B is not 0 to T for every row, or if only one of cache and call has segments. Under jit only shapes are known,
    so check the values before."""
    B, T = tokens_BT.shape
    if len(cache.length_B) != B:
        raise InputError("the number of rows differs from the cache's", expected=f"{len(cache.length_B)}", found=B)
    if (cache.segments_BS is None) != (segments_BT is None):
        expected, found = ("segments_BT" if given is not None else "none" for given in (cache.segments_BS, segments_BT))
        hint = "pass segments=True to init_cache if documents share a row, and segments_BT to every call"
        raise InputError("the segments do not fit the cache", expected=expected, found=found, hint=hint)
    if valid_B is not None and not isinstance(valid_B, jax.core.Tracer):
        valid = np.asarray(valid_B)
        if valid.shape != (B,) or valid.min() < 0 or valid.max() > T:
            raise InputError("valid_B is out of range", expected=f"{B} numbers from 0 to {T}", found=valid.tolist())
    if isinstance(cache.length_B, jax.core.Tracer):
        return
    longest = int(np.max(cache.length_B))
    if longest + T > cache.capacity:
        raise InputError(
            "the cache is full",
            expected=f"at most {cache.capacity} tokens",
            found=f"{longest} cached + {T} new",
            hint="create the cache with a larger capacity",
        )
