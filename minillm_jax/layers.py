"""The parts of the model other than attention: linear layer, embedding, norm, rotary rotation (RoPE), MLP.

Shapes: B batch, T time, D width, F hidden, N heads, H head dim, V vocabulary. Parameters keep their own dtype; matrix
products run in `compute_dtype`; norms and rotations run in at least float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig
from minillm_jax.device import without_scatter
from minillm_jax.precision import at_least_float32, precision_of


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w over the last axis of x, as one product of two matrices.

    If x keeps its leading axes, XLA:CPU transposes copies in the backward pass: a SwiGLU gradient took twice as long.
    """
    return jnp.matmul(x.reshape(-1, x.shape[-1]), w, precision=precision_of(x.dtype)).reshape(
        *x.shape[:-1], w.shape[-1]
    )


class Linear(nnx.Module):
    """x @ W without bias; W has shape (in, out)."""

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
        if without_scatter():
            return rows_of(self.embedding[...], tokens_BT, jnp.dtype(self.compute_dtype))
        return self.embedding[...][tokens_BT].astype(self.compute_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_of(embedding_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The rows of an embedding in a dtype. Its gradient is a product with one-hot vectors, not a scatter."""
    return embedding_VD[tokens_BT].astype(dtype)


def _rows_forward(
    embedding_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rows_of(embedding_VD, tokens_BT, dtype), (embedding_VD, tokens_BT)


def _rows_backward(dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], grad_BTD: jax.Array) -> tuple[jax.Array, None]:
    embedding_VD, tokens_BT = saved

    def add(total_VD: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        tokens_T, grad_TD = row
        one_hot_VT = (jnp.arange(len(total_VD))[:, None] == tokens_T).astype(dtype)
        precision = precision_of(dtype)
        return total_VD + jnp.matmul(
            one_hot_VT, grad_TD, precision=precision, preferred_element_type=total_VD.dtype
        ), None

    return jax.lax.scan(add, jnp.zeros_like(embedding_VD), (tokens_BT, grad_BTD))[0], None


rows_of.defvjp(_rows_forward, _rows_backward)


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
    """The factors (B, T, 1, H) for `apply_rope`, from the cosines and sines of the H/2 angles at each position."""
    cos_BTH, sin_BTH = jnp.concatenate([cos_BTh, cos_BTh], axis=-1), jnp.concatenate([-sin_BTh, sin_BTh], axis=-1)
    return cos_BTH[:, :, None], sin_BTH[:, :, None]


def apply_rope(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """Rotates channels i and i + H/2 together by the angle of the position; cos and sin come from `rotation`."""
    x = x_BTNH.astype(cos_BT1H.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return (x * cos_BT1H + jnp.concatenate([second, first], axis=-1) * sin_BT1H).astype(x_BTNH.dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, param_dtype: DTypeLike, compute_dtype: DTypeLike):
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.gate_proj = Linear(config.width, config.hidden, **dtypes)
        self.up_proj = Linear(config.width, config.hidden, **dtypes)
        self.down_proj = Linear(config.hidden, config.width, **dtypes)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
