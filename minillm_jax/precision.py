"""Precision: the dtypes of parameters and matrix products, and what is promoted to float32."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from minillm_core.errors import InputError
from minillm_jax.device import target_device


def auto_dtype() -> str:
    """What `train.compute_dtype: auto` means on this machine: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if target_device().platform == "gpu" else "float32"


DTYPES = ("float32", "bfloat16", "float64")


def resolve_dtype(name: str) -> jnp.dtype:
    """The dtype for a name (`float32`, `bfloat16`, `float64`) or for `auto`. `float64` enables JAX's 64-bit mode.

    Raises:
        InputError: a different name.
    """
    name = auto_dtype() if name == "auto" else name
    if name not in DTYPES:
        raise InputError("unknown dtype", expected=f"auto, {', '.join(DTYPES)}", found=repr(name))
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        jax.config.update("jax_enable_x64", True)  # without it JAX would silently compute in float32
    return jnp.dtype(name)


def param_dtype(compute_dtype: jnp.dtype) -> jnp.dtype:
    """Master parameters are float32; float64 runs keep them in float64."""
    return jnp.promote_types(compute_dtype, jnp.float32)


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """float32 for float32 and smaller, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def precision_of(dtype: DTypeLike) -> jax.lax.Precision | None:
    """The precision of matrix products: 16-bit ones keep XLA's default, which allows all fast kernels; float32 ones are
    computed in float32 (no TF32)."""
    return None if jnp.dtype(dtype).itemsize == 2 else jax.lax.Precision.HIGHEST
