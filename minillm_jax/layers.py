"""The model's parts.

Shapes: B batch, T query time, S key time, D width, F hidden, N query heads, K key/value heads, G = N / K, H head dim,
V vocabulary. Parameters keep their own dtype; matrix products run in `compute_dtype`; norms, rotations, softmax and
loss run in at least float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig
from minillm_jax.kv_cache import LayerCache, append


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


def apply_rope(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Turns channel i together with channel i + H/2 by the angle of the position; cos and sin have H/2 channels."""
    cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
    first, second = jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, position_BT: jax.Array) -> jax.Array:
    """Grouped-query attention: the query at position p sees the keys at positions 0 to p; (B, T, N, H)."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    high = at_least_float32(q_BTNH.dtype)
    G, precision = N // K, precision_of(q_BTNH.dtype)
    q_BKxH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)  # x: a group's queries
    scores_BKxS = (
        jnp.einsum("BKxH,BKSH->BKxS", q_BKxH, k_BKSH, precision=precision, preferred_element_type=high) * H**-0.5
    )
    visible_BTS = jnp.arange(S) <= position_BT[:, :, None]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKxS.reshape(B, K, G, T, S), -jnp.inf)
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

    def qkv(self, x_BTD: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, turned by their positions, and values: (B, T, N or K, H)."""
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = (
            proj(x_BTD).reshape(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        qk_BTxH = apply_rope(jnp.concatenate([q_BTNH, k_BTKH], axis=2), cos_BTH, sin_BTH)  # x: all heads that turn
        q_BTNH, k_BTKH = jnp.split(qk_BTxH, [q_BTNH.shape[2]], axis=2)
        return q_BTNH, k_BTKH, v_BTKH

    def __call__(
        self,
        x_BTD: jax.Array,
        cos_BTH: jax.Array,
        sin_BTH: jax.Array,
        position_BT: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = self.qkv(x_BTD, cos_BTH, sin_BTH)
        if cache is not None:
            cache = append(cache, k_BTKH, v_BTKH, position_BT)
            out_BTNH = attend(q_BTNH, cache.k_BKSH, cache.v_BKSH, position_BT)
        elif can_fuse(q_BTNH):
            out_BTNH = attend_fused(q_BTNH, k_BTKH, v_BTKH)
        else:
            k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
            out_BTNH = attend(q_BTNH, k_BKTH, v_BKTH, position_BT)
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
        self,
        x_BTD: jax.Array,
        cos_BTH: jax.Array,
        sin_BTH: jax.Array,
        position_BT: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), cos_BTH, sin_BTH, position_BT, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache
