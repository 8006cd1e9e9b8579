"""The device: its choice, its description, copies to and from it, and bit-for-bit reproducible results."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm_core.data.batches import Batch
from minillm_core.training.backend import StepMetrics


def describe_device() -> str:
    """Framework, version and device, for the log."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {device}"


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU. On a GPU, float32 products are computed in float32 (no TF32) and bfloat16
    products accumulate in float32."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda")


def use_deterministic_algorithms(deterministic: bool) -> None:
    """Gives the same bits in every run on one kind of GPU. The setting is process-wide and is never turned off."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads this when it starts
        torch.use_deterministic_algorithms(True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled with `torch.compile` once for every combination of shapes."""
    # By default torch stops compiling after eight combinations, and only logs it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(function, dynamic=False)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies a batch to a device, integers as int64, without waiting for a GPU to finish its work."""

    def copy(array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        tensor = tensor if tensor.is_floating_point() else tensor.long()
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Batch(**{field.name: copy(getattr(batch, field.name)) for field in dataclasses.fields(batch)})


class _HostScalar:
    """A number that is being copied from a GPU. Reading it waits for the copy, but not for work launched after it."""

    def __init__(self, value: Tensor):
        self._copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._copy.copy_(value, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def __float__(self) -> float:
        self._copied.synchronize()
        return float(self._copy)


def to_host(metrics: dict[str, Tensor]) -> StepMetrics:
    """Metrics of a step. `float(metric)` waits until the number has arrived."""
    return {name: _HostScalar(value) if value.is_cuda else value for name, value in metrics.items()}
