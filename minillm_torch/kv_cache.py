"""The key/value cache: passed in and returned, with static shapes and one length per row.

Shapes: B batch, T new tokens, S capacity, K key/value heads, H head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError


@dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer, by index in the row."""

    k_BKSH: Tensor
    v_BKSH: Tensor


@dataclass(frozen=True)
class KVCache:
    """One LayerCache per layer, and the number of filled indices in each row (int64, on the host: `check_room` never
    waits for a GPU). Indices beyond a row's length are never read: a query at index i sees no key after i, and key i
    has just been written.

    A call writes new keys and values in place, after the filled indices, so the cache that it was given stays valid.
    A second call with that same cache would overwrite them, so it works on a copy (see `writable`)."""

    layers: tuple[LayerCache, ...]
    length_B: Tensor
    written_B: Tensor
    """Positions written in each row: one tensor (int64, on the host), shared by all caches that share the layers."""
    segments_BS: Tensor | None = None
    """The document of every key (int64), if several documents share a row."""

    @property
    def capacity(self) -> int:
        return self.layers[0].k_BKSH.shape[2]


def init_cache(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    dtype: torch.dtype,
    segments: bool = False,
    device: torch.device | str = "cpu",
) -> KVCache:
    """An empty cache for up to `capacity` tokens per row; raises InputError if that exceeds the context length.

    Args:
        segments: several documents may share a row; every call must then give `segments_BT`.
    """
    if capacity > config.context_length:
        raise InputError("the cache is longer than the context", expected=config.context_length, found=capacity)
    shape = (batch_size, config.n_kv_heads, capacity, config.resolved_head_dim)

    def zeros() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    layers = tuple(LayerCache(zeros(), zeros()) for _ in range(config.n_layers))
    length_B = torch.zeros(batch_size, dtype=torch.int64)
    segments_BS = torch.zeros((batch_size, capacity), dtype=torch.int64, device=device) if segments else None
    return KVCache(layers, length_B, length_B.clone(), segments_BS)


Slots = Tensor
"""Indices of (B, T, K), flattened, into the B * K * S vectors of a layer."""


def slots(cache: KVCache, index_BT: Tensor) -> Slots:
    """Where the keys and values (B, T, K, H) of the tokens at these indices of the rows go in every layer."""
    B, K, S, _ = cache.layers[0].k_BKSH.shape
    row_B, head_K = (torch.arange(n, device=index_BT.device) for n in (B, K))
    return ((row_B[:, None, None] * K + head_K) * S + index_BT[:, :, None]).flatten()


def append(cache: LayerCache, k_BTKH: Tensor, v_BTKH: Tensor, slots: Slots) -> LayerCache:
    """Writes keys and values into their slots; every row has its own indices."""
    for old_BKSH, new_BTKH in ((cache.k_BKSH, k_BTKH), (cache.v_BKSH, v_BTKH)):
        H = new_BTKH.shape[-1]
        old_BKSH.view(-1, H).index_copy_(0, slots, new_BTKH.reshape(-1, H).to(old_BKSH.dtype))
    return cache


def append_segments(cache: KVCache, segments_BT: Tensor | None, index_BT: Tensor) -> KVCache:
    """The cache with the segments of new tokens at these indices of the rows; itself if it has no segments."""
    if segments_BT is None:
        return cache
    assert cache.segments_BS is not None  # both or neither: `check_room`
    cache.segments_BS.scatter_(1, index_BT, segments_BT)
    return cache


def take_rows(cache: KVCache, rows_B: Tensor, capacity: int) -> KVCache:
    """A new cache with the given rows, in the given order (rows may repeat), cut or extended to `capacity`, which must
    have room for their tokens. The given cache does not change."""
    n_kept = min(cache.capacity, capacity)

    def take(x_BKSH: Tensor) -> Tensor:
        _, K, _, H = x_BKSH.shape
        new_BKSH = x_BKSH.new_zeros((len(rows_B), K, capacity, H))
        new_BKSH[:, :, :n_kept] = x_BKSH[rows_B.to(x_BKSH.device), :, :n_kept]
        return new_BKSH

    layers = tuple(LayerCache(take(layer.k_BKSH), take(layer.v_BKSH)) for layer in cache.layers)
    segments_BS = cache.segments_BS
    if segments_BS is not None:
        new_BS = segments_BS.new_zeros((len(rows_B), capacity))
        new_BS[:, :n_kept] = segments_BS[rows_B.to(segments_BS.device), :n_kept]
        segments_BS = new_BS
    return KVCache(layers, cache.length_B[rows_B], cache.length_B[rows_B], segments_BS)


def put_row(cache: KVCache, row: int, one: KVCache) -> KVCache:
    """The cache with one of its rows replaced, in place, by the only row of `one`, a cache of the same capacity."""
    for layer, new in zip(cache.layers, one.layers, strict=True):
        layer.k_BKSH[row] = new.k_BKSH[0]
        layer.v_BKSH[row] = new.v_BKSH[0]
    if cache.segments_BS is not None and one.segments_BS is not None:
        cache.segments_BS[row] = one.segments_BS[0]
    length_B = cache.length_B.clone()
    length_B[row] = one.length_B[0]
    cache.written_B.copy_(length_B)
    return KVCache(cache.layers, length_B, cache.written_B, cache.segments_BS)


def only_rows(cache: KVCache, active_B: Tensor) -> KVCache:
    """The cache with all other rows empty."""
    length_B = torch.where(active_B, cache.length_B, 0)
    cache.written_B.copy_(length_B)
    return KVCache(cache.layers, length_B, cache.written_B, cache.segments_BS)


def writable(cache: KVCache) -> KVCache:
    """The cache itself, or a copy if writing in place would do harm: an earlier call has already continued this cache,
    gradients are recorded, or the cache was made in inference mode and that mode has ended."""
    outlived = cache.written_B.is_inference() and not torch.is_inference_mode_enabled()
    if torch.equal(cache.written_B, cache.length_B) and not torch.is_grad_enabled() and not outlived:
        return cache
    layers = tuple(LayerCache(layer.k_BKSH.clone(), layer.v_BKSH.clone()) for layer in cache.layers)
    segments_BS = None if cache.segments_BS is None else cache.segments_BS.clone()
    return KVCache(layers, cache.length_B, cache.length_B.clone(), segments_BS)


def check_room(cache: KVCache, tokens_BT: Tensor, valid_B: Tensor | None, segments_BT: Tensor | None) -> None:
    """Raises InputError if the number of rows differs from the cache's, if a row has no room for T more tokens, if
    valid_B is not 0 to T for every row, or if only one of cache and call has segments."""
    B, T = tokens_BT.shape
    if len(cache.length_B) != B:
        raise InputError("the number of rows differs from the cache's", expected=f"{len(cache.length_B)}", found=B)
    if (cache.segments_BS is None) != (segments_BT is None):
        expected, found = ("segments_BT" if given is not None else "none" for given in (cache.segments_BS, segments_BT))
        hint = "pass segments=True to init_cache if documents share a row, and segments_BT to every call"
        raise InputError("the segments do not fit the cache", expected=expected, found=found, hint=hint)
    if valid_B is not None and (valid_B.shape != (B,) or int(valid_B.min()) < 0 or int(valid_B.max()) > T):
        raise InputError("valid_B is out of range", expected=f"{B} numbers from 0 to {T}", found=valid_B.tolist())
    longest = int(cache.length_B.max())
    if longest + T > cache.capacity:
        raise InputError(
            "the cache is full",
            expected=f"at most {cache.capacity} tokens",
            found=f"{longest} cached + {T} new",
            hint="create the cache with a larger capacity",
        )
