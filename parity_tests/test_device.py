"""What the code does only on a GPU, checked without one: copies, precision and reproducible kernels."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import torch

from minillm_core.data.batches import Batch
from minillm_jax import loss as jax_loss
from minillm_torch import device as torch_device
from parity_tests.conftest import BACKENDS, TINY, random_tokens, run_config

pytestmark = pytest.mark.extended


class Stream:
    """A stand-in for a GPU, which does its work in order and only when an event is waited for."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def empty(self, shape: Any, *, dtype: Any, pin_memory: bool) -> "Host":
        assert pin_memory, "a copy to memory that is not pinned waits for the GPU"
        return Host(self)

    def event(self) -> "Event":
        return Event(self)


class Host:
    """Memory of the host, into which a number is copied."""

    def __init__(self, stream: Stream):
        self.stream, self.value = stream, math.nan

    def copy_(self, value: Any, *, non_blocking: bool) -> None:
        assert non_blocking
        self.stream.work.append(lambda: setattr(self, "value", value.number))

    def __float__(self) -> float:
        return self.value


class Event:
    def __init__(self, stream: Stream):
        self.stream, self.before = stream, 0

    def record(self) -> None:
        self.before = len(self.stream.work)

    def synchronize(self) -> None:
        for work in self.stream.work[: self.before]:
            work()


def test_reading_a_metric_waits_for_its_copy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`float(metric)` gives the number that was copied, and does not wait for the work that was launched after it."""
    stream = Stream()
    monkeypatch.setattr(
        torch_device, "torch", SimpleNamespace(empty=stream.empty, cuda=SimpleNamespace(Event=stream.event))
    )
    on_gpu = SimpleNamespace(is_cuda=True, shape=(), dtype=torch.float32, number=2.5)
    on_cpu = torch.tensor(1.5)
    metrics = torch_device.to_host({"loss": on_gpu, "grad_norm": on_cpu})
    stream.work.append(lambda: pytest.fail("waited for later work"))
    assert float(metrics["loss"]) == 2.5
    assert metrics["grad_norm"] is on_cpu


def test_a_batch_is_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array is pinned, then copied asynchronously, integers as int64."""
    copies: list[tuple[torch.dtype, torch.device, bool]] = []
    pinned: list[int] = []

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        copies.append((tensor.dtype, device, non_blocking and id(tensor) in pinned))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(id(tensor)) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    gpu = torch.device("cuda")
    copied = torch_device.to_device(Batch.from_rows(random_tokens(TINY, 2, 6)), gpu)
    assert copies == [(dtype, gpu, True) for dtype in (torch.int64, torch.int64, torch.float32)]
    assert [field.name for field in dataclasses.fields(copied) if getattr(copied, field.name) is None] == [
        "positions_BT",
        "segments_BT",
    ]


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Restores the settings of the process."""
    matmul = torch.backends.cuda.matmul
    precision, reduced = torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction
    variable = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.set_float32_matmul_precision(precision)
    matmul.allow_bf16_reduced_precision_reduction = reduced
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if variable is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = variable


def test_the_gpu_computes_in_float32(torch_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32 and no bfloat16 sums, even if the process had allowed them."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device.default_device() == torch.device("cuda")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("framework", BACKENDS)
def test_reproducible_kernels_are_asked_for(
    framework: str, deterministic: bool, torch_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the train step and by the evaluation step, if `train.deterministic` says so."""
    backend, config = BACKENDS[framework], run_config(TINY, deterministic=deterministic)
    asked: list[bool] = []
    jit = jax.jit

    def seen(*arguments: Any, compiler_options: dict[str, bool] | None = None, **rest: Any) -> Any:
        if compiler_options is not None:
            asked.append(compiler_options.get("xla_gpu_deterministic_ops", False))
        return jit(*arguments, **rest)

    monkeypatch.setattr(jax, "jit", seen)
    jax_loss._jit_losses.cache_clear()
    model = backend.model_of(config, backend.init_state(config))
    for make in (
        lambda: backend.make_train_step(config),
        lambda: backend.make_eval_step(model, deterministic=deterministic),
    ):
        torch.use_deterministic_algorithms(False)
        make()
        asked += [torch.are_deterministic_algorithms_enabled()] if framework == "torch" else []
    assert asked == [deterministic] * 2
    if framework == "torch" and deterministic:
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
