"""The device: what it is called, and whether it must repeat its results to the bit."""

import jax


def describe_device() -> str:
    """Framework, version and device, for the log."""
    return f"jax {jax.__version__} on {jax.devices()[0].device_kind}"


def compiler_options(*, deterministic: bool) -> dict[str, bool]:
    """Options for `jax.jit`. Deterministic: the same bits in every run on one kind of GPU, by kernels that are
    deterministic and are chosen without timing them."""
    return {"xla_gpu_deterministic_ops": True} if deterministic else {}
