"""Attention: the mask and its lowering, a plain implementation, a fused kernel, and the module that uses them.

Shapes: B batch, T query time, S key time, D width, N query heads, K key/value heads, G = N / K, H head dim. The softmax
runs in at least float32.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig, RunConfig
from minillm_core.errors import InputError
from minillm_core.model.mask import AttentionMask, effective_window, kernel_limit
from minillm_jax.device import target_device
from minillm_jax.kv_cache import LayerCache, Slots, append
from minillm_jax.layers import Linear, apply_rope
from minillm_jax.precision import at_least_float32, precision_of, resolve_dtype

logger = logging.getLogger(__name__)

jax.tree_util.register_dataclass(
    AttentionMask,
    data_fields=["query_index_BT", "query_segments_BT", "key_segments_BS"],
    meta_fields=["window"],
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PositionContext:
    """What the positions of a call's tokens determine: RoPE factors, mask and cache slots. All layers share it."""

    cos_BT1H: jax.Array
    sin_BT1H: jax.Array
    mask: AttentionMask
    bias_BTS: jax.Array | None
    """The mask for the plain implementation; None if the fused kernel computes it (see `lower`)."""
    slots: Slots | None
    """Where the new keys and values go in the cache; None without a cache."""


def lower(mask: AttentionMask, n_queries: int, n_keys: int, head_dim: int, dtype: DTypeLike) -> jax.Array | None:
    """None if the fused kernel can compute this mask, else what the plain implementation adds to the scores."""
    limit, part = _kernel_limit(n_queries, head_dim, dtype), _inexpressible(mask)
    if limit is None and part is None:
        return None
    if limit is None and mask.query_index_BT is None:  # with a cache, attention is always plain
        _say_plain(part)
    return mask_bias(mask, n_queries, n_keys, dtype)


def mask_bias(mask: AttentionMask, n_queries: int, n_keys: int, dtype: DTypeLike) -> jax.Array:
    """The term added to the scores, (B, T, S) or (1, T, S): 0 for the keys that a query sees, else -inf."""
    index_BT = jnp.arange(n_queries)[None] if mask.query_index_BT is None else mask.query_index_BT
    query_BT1, key_S = index_BT[:, :, None], jnp.arange(n_keys)
    hidden_BTS = key_S > query_BT1
    if mask.window is not None:
        hidden_BTS = hidden_BTS | (key_S <= query_BT1 - mask.window)
    if mask.query_segments_BT is not None and mask.key_segments_BS is not None:
        hidden_BTS = hidden_BTS | (mask.query_segments_BT[:, :, None] != mask.key_segments_BS[:, None])
    return jnp.where(hidden_BTS, -jnp.inf, 0).astype(dtype)


@lru_cache
def _say_plain(part: str | None) -> None:
    """Says once for each part why attention is not fused."""
    logger.info(f"plain attention, which is slower and needs more memory: the fused kernel cannot compute {part}")


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, bias_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention: softmax(q k^T / sqrt(H) + bias) v; (B, T, N, H)."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    high = at_least_float32(q_BTNH.dtype)
    G, precision = N // K, precision_of(q_BTNH.dtype)
    q_BKxH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)  # x: all queries of a group
    scores_BKxS = (
        jnp.einsum("BKxH,BKSH->BKxS", q_BKxH, k_BKSH, precision=precision, preferred_element_type=high) * H**-0.5
    )
    scores_BKGTS = scores_BKxS.reshape(B, K, G, T, S) + bias_BTS[:, None, None]
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKxH = jnp.matmul(weights_BKGTS.reshape(B, K, G * T, S), v_BKSH, precision=precision)
    return out_BKxH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_fused(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: AttentionMask) -> jax.Array:
    """The same as `attend`, as one cuDNN kernel that never stores the scores.

    Raises:
        InputError: the kernel cannot express the mask.
    """
    if (part := _inexpressible(mask)) is not None:
        raise InputError("the fused attention kernel cannot compute this mask", found=part, expected="a causal mask")
    window = None if mask.window is None else (mask.window - 1, 0)  # keys before the query, and after it
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=window, implementation="cudnn"
    )


def _inexpressible(mask: AttentionMask) -> str | None:
    """The part of a mask that the fused kernel cannot express."""
    if mask.query_segments_BT is not None:
        return "segments (documents that share a row)"
    return None if mask.query_index_BT is None else "queries that continue a cache"


def why_not_fused(mask: AttentionMask, n_queries: int, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why the fused kernel cannot compute this attention; None if it can."""
    return _kernel_limit(n_queries, head_dim, dtype) or _inexpressible(mask)


def _kernel_limit(n_queries: int, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why these inputs are not fused, whatever the mask: see core's `kernel_limit`."""
    device = target_device()
    capability = float(device.compute_capability) if device.platform == "gpu" else None
    return kernel_limit(capability, jnp.dtype(dtype).name, head_dim, n_queries)


def describe_attention(config: RunConfig) -> str:
    """The attention that a run uses, for the log."""
    model, dtype = config.model, resolve_dtype(config.train.compute_dtype)
    T = config.train.seq_len
    segments = jnp.zeros((1, 1), jnp.int32) if config.data.document_mask else None
    mask = AttentionMask(effective_window(model.sliding_window, T), None, segments, segments)
    why = why_not_fused(mask, T, model.resolved_head_dim, dtype)
    return "fused attention (cuDNN)" if why is None else f"plain attention: {why}"


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
        q_BTNH, k_BTKH = (apply_rope(x, positions.cos_BT1H, positions.sin_BT1H) for x in (q_BTNH, k_BTKH))
        return q_BTNH, k_BTKH, v_BTKH

    def __call__(
        self, x_BTD: jax.Array, positions: PositionContext, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = self.qkv(x_BTD, positions)
        if cache is not None:
            assert positions.slots is not None  # set whenever there is a cache
            assert positions.bias_BTS is not None  # the fused kernel takes no cache
            cache = append(cache, k_BTKH, v_BTKH, positions.slots)
            out_BTNH = attend(q_BTNH, cache.k_BKSH, cache.v_BKSH, positions.bias_BTS)
        elif positions.bias_BTS is None:
            out_BTNH = attend_fused(q_BTNH, k_BTKH, v_BTKH, positions.mask)
        else:
            k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
            out_BTNH = attend(q_BTNH, k_BKTH, v_BKTH, positions.bias_BTS)
        return self.o_proj(out_BTNH.reshape(B, T, -1)), cache
