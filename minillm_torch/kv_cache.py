"""The key/value cache: state in, state out, static shapes, one length per row.

Shapes: B batch, T new tokens, S capacity, K key/value heads, H head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError


@dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer, by position."""

    k_BSKH: Tensor
    v_BSKH: Tensor


@dataclass(frozen=True)
class KVCache:
    """One LayerCache per layer, and how many positions of each row are filled (int64, on the host, so that checking the
    room never waits for a GPU). What lies beyond a row's length is never seen: a query at position p sees keys 0 to p,
    and p itself has just been written. The tensors are reused: a cache that was passed on must not be used again."""

    layers: tuple[LayerCache, ...]
    length_B: Tensor

    @property
    def capacity(self) -> int:
        return self.layers[0].k_BSKH.shape[1]


def init_cache(
    config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> KVCache:
    """An empty cache for up to `capacity` tokens per row; raises InputError if that is more than the context."""
    if capacity > config.context_length:
        raise InputError("the cache is longer than the context", expected=config.context_length, found=capacity)
    shape = (batch_size, capacity, config.n_kv_heads, config.resolved_head_dim)

    def zeros() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    layers = tuple(LayerCache(zeros(), zeros()) for _ in range(config.n_layers))
    return KVCache(layers, torch.zeros(batch_size, dtype=torch.int64))


def append(cache: LayerCache, k_BTKH: Tensor, v_BTKH: Tensor, position_BT: Tensor) -> LayerCache:
    """Writes keys and values at their positions, each row at its own."""
    row_B1 = torch.arange(position_BT.shape[0], device=position_BT.device)[:, None]
    cache.k_BSKH[row_B1, position_BT] = k_BTKH.to(cache.k_BSKH.dtype)
    cache.v_BSKH[row_B1, position_BT] = v_BTKH.to(cache.v_BSKH.dtype)
    return cache


def check_room(cache: KVCache, n_tokens: int) -> None:
    """Raises InputError if a row has no room for `n_tokens` more."""
    longest = int(cache.length_B.max())
    if longest + n_tokens > cache.capacity:
        raise InputError(
            "the cache is full",
            expected=f"at most {cache.capacity} tokens",
            found=f"{longest} cached + {n_tokens} new",
            do="start with a larger capacity",
        )
