"""The bounds, measured in a framework: the rate of a large matrix product, and the bandwidth of the memory."""

import importlib
import time
from collections.abc import Callable
from typing import Any

SECONDS = 0.3
"""How long each program is repeated."""
N_BYTES = 1 << 28
"""Of each array that is copied: more than the caches of a processor hold."""


def measure(framework: str, dtype: str) -> dict[str, float]:
    """The largest rates that were seen: FLOP/s of a product in the dtype, and bytes per second that were moved."""
    flops, bandwidth = _in_jax(dtype) if framework == "jax" else _in_torch(dtype)
    return {"flops": flops, "bandwidth": bandwidth}


def _in_torch(dtype: str) -> tuple[float, float]:
    torch = importlib.import_module("torch")
    device = importlib.import_module("minillm_torch.device").default_device()
    on_gpu = device.type == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    n = _side(on_gpu)
    a, b, out = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(3))
    x, y, z = (torch.ones(N_BYTES // 4, device=device) for _ in range(3))
    with torch.inference_mode():
        product = _shortest(lambda: torch.mm(a, b, out=out), wait, 10 if on_gpu else 1)
        triad = _shortest(lambda: torch.add(x, y, alpha=2, out=z), wait, 10 if on_gpu else 1)
        read = _shortest(x.sum, wait, 10 if on_gpu else 1)
    return 2 * n**3 / product, max(3 * N_BYTES / triad, N_BYTES / read)


def _in_jax(dtype: str) -> tuple[float, float]:
    jax = importlib.import_module("jax")
    jnp = jax.numpy
    on_gpu = jax.default_backend() == "gpu"
    precision = importlib.import_module("minillm_jax.precision").precision_of(dtype)
    n = _side(on_gpu)
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    x, y = jnp.ones(N_BYTES // 4), jnp.ones(N_BYTES // 4)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    add, total = jax.jit(lambda x, y: x + 2 * y), jax.jit(jnp.sum)
    last: Any = None

    def repeated(program: Callable[..., Any], *inputs: Any) -> float:
        def call() -> None:
            nonlocal last
            last = program(*inputs)

        return _shortest(call, lambda: last.block_until_ready(), 10 if on_gpu else 1)

    product, triad, read = repeated(multiply, a, b), repeated(add, x, y), repeated(total, x)
    return 2 * n**3 / product, max(3 * N_BYTES / triad, N_BYTES / read)


def _side(on_gpu: bool) -> int:
    return 8192 if on_gpu else 2048


def _shortest(call: Callable[[], object], wait: Callable[[], object], together: int) -> float:
    """Seconds of one call in the fastest of many repetitions, each of some calls without waiting in between."""
    call()
    wait()
    shortest, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end or shortest == float("inf"):
        started = time.perf_counter()
        for _ in range(together):
            call()
        wait()
        shortest = min(shortest, (time.perf_counter() - started) / together)
    return shortest
