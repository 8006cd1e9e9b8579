"""The model's parts.

Shapes: B batch, T query time, S key time, D width, F hidden, N query heads, K key/value heads, G = N / K, H head dim,
V vocabulary. Parameters keep their own dtype; matrix products run in `compute_dtype`; norms, rotations, softmax and
loss run in at least float32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig
from minillm_jax.kv_cache import LayerCache, Slots, append


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Where the tokens of a call are, the same for every layer."""

    cos_BT1H: jax.Array
    sin_BT1H: jax.Array
    mask_BTS: jax.Array
    slots: Slots | None
    """Where the cache keeps them."""


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """float32 for float32 and smaller, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def precision_of(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 means float32, without TF32; 16-bit products keep XLA's default, which leaves it every fast kernel."""
    return None if jnp.dtype(dtype).itemsize == 2 else jax.lax.Precision.HIGHEST


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w over the last axis of x, as one product of two matrices.

    Left with its leading axes, XLA:CPU transposes copies in the backward pass: a SwiGLU gradient took twice as long.
    """
    return jnp.matmul(x.reshape(-1, x.shape[-1]), w, precision=precision_of(x.dtype)).reshape(
        *x.shape[:-1], w.shape[-1]
    )


class Linear(nnx.Module):
    """x @ W without bias, W (in, out)."""

    def __init__(self, d_in: int, d_out: int, *, param_dtype: DTypeLike, compute_dtype: DTypeLike):
        self.compute_dtype = compute_dtype
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.compute_dtype
        return matmul(x.astype(dtype), self.kernel[...].astype(dtype))


class Embedding(nnx.Module):
    """Token embedding (V, D), which a tied model also uses as its output head."""

    def __init__(self, vocab_size: int, width: int, *, param_dtype: DTypeLike, compute_dtype: DTypeLike):
        self.compute_dtype = compute_dtype
        self.embedding = nnx.Param(jnp.zeros((vocab_size, width), param_dtype))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return self.embedding[...][tokens_BT].astype(self.compute_dtype)

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        """Logits (B, T, V): the product of every position with every token's embedding."""
        dtype = self.compute_dtype
        return matmul(x_BTD.astype(dtype), self.embedding[...].astype(dtype).T)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, *, eps: float, param_dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, param_dtype))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        high = at_least_float32(x_BTD.dtype)
        x = x_BTD.astype(high)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(high)).astype(x_BTD.dtype)


def rotation(cos_BTh: jax.Array, sin_BTh: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `apply_rope` takes, of the cosines and sines of the H/2 angles at each position: (B, T, 1, H)."""
    return jnp.concatenate([cos_BTh, cos_BTh], axis=-1)[:, :, None], jnp.concatenate([-sin_BTh, sin_BTh], axis=-1)[
        :, :, None
    ]


def apply_rope(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """Turns channel i together with channel i + H/2 by the angle of the position; cos and sin are of `rotation`."""
    x = x_BTNH.astype(cos_BT1H.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return (x * cos_BT1H + jnp.concatenate([second, first], axis=-1) * sin_BT1H).astype(x_BTNH.dtype)


def causal_mask(position_BT: jax.Array, n_keys: int, dtype: DTypeLike) -> jax.Array:
    """What is added to the scores (B, T, S): -inf, but 0 where the query at position p sees the keys at 0 to p."""
    later_BTS = jnp.arange(n_keys) > position_BT[:, :, None]
    return jnp.where(later_BTS, -jnp.inf, 0).astype(dtype)


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention: softmax(q k^T / sqrt(H) + mask) v; (B, T, N, H)."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    high = at_least_float32(q_BTNH.dtype)
    G, precision = N // K, precision_of(q_BTNH.dtype)
    q_BKxH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)  # x: a group's queries
    scores_BKxS = (
        jnp.einsum("BKxH,BKSH->BKxS", q_BKxH, k_BKSH, precision=precision, preferred_element_type=high) * H**-0.5
    )
    scores_BKGTS = scores_BKxS.reshape(B, K, G, T, S) + mask_BTS[:, None, None]
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKxH = jnp.matmul(weights_BKGTS.reshape(B, K, G * T, S), v_BKSH, precision=precision)
    return out_BKxH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_fused(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """`attend` over the same positions, 0 to T - 1, as one cuDNN kernel that never stores the scores."""
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")


def can_fuse(q_BTNH: jax.Array) -> bool:
    """Whether the fused kernel's conditions hold: an Ampere or later GPU, 16-bit inputs, head_dim a multiple of 8 up to
    128, even T."""
    _, T, _, H = q_BTNH.shape
    fits = q_BTNH.dtype.itemsize == 2 and H % 8 == 0 and H <= 128 and T % 2 == 0
    return fits and jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) >= 8.0


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

    def qkv(self, x_BTD: jax.Array, places: Places) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, turned by their positions, and values: (B, T, N or K, H)."""
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = (
            proj(x_BTD).reshape(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        qk_BTxH = jnp.concatenate([q_BTNH, k_BTKH], axis=2)  # x: all heads that turn
        qk_BTxH = apply_rope(qk_BTxH, places.cos_BT1H, places.sin_BT1H)
        q_BTNH, k_BTKH = jnp.split(qk_BTxH, [q_BTNH.shape[2]], axis=2)
        return q_BTNH, k_BTKH, v_BTKH

    def __call__(
        self, x_BTD: jax.Array, places: Places, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = self.qkv(x_BTD, places)
        if cache is not None:
            assert places.slots is not None  # made where there is a cache
            cache = append(cache, k_BTKH, v_BTKH, places.slots)
            out_BTNH = attend(q_BTNH, cache.k_BKSH, cache.v_BKSH, places.mask_BTS)
        elif can_fuse(q_BTNH):
            out_BTNH = attend_fused(q_BTNH, k_BTKH, v_BTKH)
        else:
            k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
            out_BTNH = attend(q_BTNH, k_BKTH, v_BKTH, places.mask_BTS)
        return self.o_proj(out_BTNH.reshape(B, T, -1)), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, param_dtype: DTypeLike, compute_dtype: DTypeLike):
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.gate_proj = Linear(config.width, config.hidden, **dtypes)
        self.up_proj = Linear(config.width, config.hidden, **dtypes)
        self.down_proj = Linear(config.hidden, config.width, **dtypes)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, param_dtype: DTypeLike, compute_dtype: DTypeLike):
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.input_layernorm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, **dtypes)
        self.post_attention_layernorm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.mlp = MLP(config, **dtypes)

    def __call__(
        self, x_BTD: jax.Array, places: Places, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), places, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache
