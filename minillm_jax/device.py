"""The device: its description, and the options for bit-for-bit reproducible results."""

import jax


def describe_device() -> str:
    """Framework, version and device, for the log."""
    return f"jax {jax.__version__} on {jax.devices()[0].device_kind}"


def compiler_options(*, deterministic: bool) -> dict[str, bool]:
    """Options for `jax.jit`. With `deterministic`, every run on one kind of GPU gives the same bits: all kernels are
    deterministic, and none is chosen by timing (no autotuning)."""
    return {"xla_gpu_deterministic_ops": True} if deterministic else {}
