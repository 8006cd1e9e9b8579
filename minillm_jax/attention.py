"""Attention: the causal mask, a plain implementation, a fused kernel, and the module that chooses between the two.

Shapes: B batch, T query time, S key time, D width, N query heads, K key/value heads, G = N / K, H head dim. The softmax
runs in at least float32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig
from minillm_jax.device import target_device
from minillm_jax.kv_cache import LayerCache, Slots, append
from minillm_jax.layers import Linear, apply_rope
from minillm_jax.precision import at_least_float32, precision_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PositionContext:
    """What the positions of a call's tokens determine: RoPE factors, mask and cache slots. All layers share it."""

    cos_BT1H: jax.Array
    sin_BT1H: jax.Array
    mask_BTS: jax.Array
    slots: Slots | None
    """Where the new keys and values go in the cache; None without a cache."""


def causal_mask(position_BT: jax.Array, n_keys: int, dtype: DTypeLike) -> jax.Array:
    """The term added to the scores (B, T, S): 0 for the keys that a query at position p sees (0 to p), else -inf."""
    later_BTS = jnp.arange(n_keys) > position_BT[:, :, None]
    return jnp.where(later_BTS, -jnp.inf, 0).astype(dtype)


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention: softmax(q k^T / sqrt(H) + mask) v; (B, T, N, H)."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    high = at_least_float32(q_BTNH.dtype)
    G, precision = N // K, precision_of(q_BTNH.dtype)
    q_BKxH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)  # x: all queries of a group
    scores_BKxS = (
        jnp.einsum("BKxH,BKSH->BKxS", q_BKxH, k_BKSH, precision=precision, preferred_element_type=high) * H**-0.5
    )
    scores_BKGTS = scores_BKxS.reshape(B, K, G, T, S) + mask_BTS[:, None, None]
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKxH = jnp.matmul(weights_BKGTS.reshape(B, K, G * T, S), v_BKSH, precision=precision)
    return out_BKxH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_fused(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """`attend` with queries and keys at positions 0 to T - 1, as one cuDNN kernel that never stores the scores."""
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")


def can_fuse(q_BTNH: jax.Array) -> bool:
    """Whether the fused kernel can run: it needs an Ampere or later GPU, 16-bit inputs, an even T, and a head_dim that
    is a multiple of 8 and at most 128."""
    _, T, _, H = q_BTNH.shape
    fits = q_BTNH.dtype.itemsize == 2 and H % 8 == 0 and H <= 128 and T % 2 == 0
    device = target_device()
    return fits and device.platform == "gpu" and float(device.compute_capability) >= 8.0


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; K key/value heads serve N query heads in groups."""

    def __init__(self, config: ModelConfig, *, param_dtype: DTypeLike, compute_dtype: DTypeLike):
        self.head_dim = config.resolved_head_dim
        D, Q, KV = config.width, config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.q_proj = Linear(D, Q, **dtypes)
        self.k_proj = Linear(D, KV, **dtypes)
        self.v_proj = Linear(D, KV, **dtypes)
        self.o_proj = Linear(Q, D, **dtypes)

    def qkv(self, x_BTD: jax.Array, positions: PositionContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, rotated by their positions (RoPE), and values: (B, T, N or K, H)."""
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = (
            proj(x_BTD).reshape(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        qk_BTxH = jnp.concatenate([q_BTNH, k_BTKH], axis=2)  # x: all heads that are rotated
        qk_BTxH = apply_rope(qk_BTxH, positions.cos_BT1H, positions.sin_BT1H)
        q_BTNH, k_BTKH = jnp.split(qk_BTxH, [q_BTNH.shape[2]], axis=2)
        return q_BTNH, k_BTKH, v_BTKH

    def __call__(
        self, x_BTD: jax.Array, positions: PositionContext, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = self.qkv(x_BTD, positions)
        if cache is not None:
            assert positions.slots is not None  # set whenever there is a cache
            cache = append(cache, k_BTKH, v_BTKH, positions.slots)
            out_BTNH = attend(q_BTNH, cache.k_BKSH, cache.v_BKSH, positions.mask_BTS)
        elif can_fuse(q_BTNH):
            out_BTNH = attend_fused(q_BTNH, k_BTKH, v_BTKH)
        else:
            k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
            out_BTNH = attend(q_BTNH, k_BKTH, v_BKTH, positions.mask_BTS)
        return self.o_proj(out_BTNH.reshape(B, T, -1)), cache
