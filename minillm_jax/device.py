"""The device: its description, which one programs are compiled for, and the options for reproducible results."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_target: ContextVar[jax.Device | None] = ContextVar("_target", default=None)


def describe_device() -> str:
    """Framework, version and device, for the log."""
    return f"jax {jax.__version__} on {jax.devices()[0].device_kind}"


def target_device() -> jax.Device:
    """The device that programs are compiled for: this machine's first one, unless `compiling_for` names a different
    one. Code that depends on the kind of device asks here, never `jax.devices()`."""
    return _target.get() or jax.devices()[0]


@contextmanager
def compiling_for(device: jax.Device) -> Iterator[None]:
    """Makes `target_device` return this device, which may be one that this machine does not have."""
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


def compiler_options(*, deterministic: bool) -> dict[str, bool]:
    """Options for `jax.jit`. With `deterministic`, every run on one kind of GPU gives the same bits: all kernels are
    deterministic, and none is chosen by timing (no autotuning)."""
    return {"xla_gpu_deterministic_ops": True} if deterministic else {}
