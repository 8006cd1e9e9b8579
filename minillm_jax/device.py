"""The device: its description, which one programs are compiled for, and the options for reproducible results."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_target: ContextVar[jax.Device | None] = ContextVar("_target", default=None)
_deterministic: ContextVar[bool] = ContextVar("_deterministic", default=False)


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


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """While a program is traced: whether `without_scatter` is true on a GPU."""
    token = _deterministic.set(wanted)
    try:
        yield
    finally:
        _deterministic.reset(token)


def without_scatter() -> bool:
    """Whether the traced program must not add to an array at indices: on a GPU, XLA's deterministic implementation of
    that is broken (jax#27796: it gives wrong results; jax 0.11.2 fails to compile it)."""
    return _deterministic.get() and target_device().platform == "gpu"


def compiler_options(*, deterministic: bool) -> dict[str, bool]:
    """Options for `jax.jit`. With `deterministic`, every run on one kind of GPU gives the same bits: all kernels are
    deterministic, and none is chosen by timing (no autotuning)."""
    return {"xla_gpu_deterministic_ops": True} if deterministic else {}
