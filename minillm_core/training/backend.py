"""The interface to a framework: the public names that minillm_jax and minillm_torch have in common."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, cast

import numpy as np

from minillm_core.config import ModelConfig, RunConfig
from minillm_core.data.batches import Batch
from minillm_core.errors import InputError, missing_package
from minillm_core.model.stages import Trace
from minillm_core.progress import progress
from minillm_core.tensors import LazyTensors, Tensors
from minillm_core.training.checkpoints import FRAMEWORKS, TrainingState

State = Any
"""Parameters and Adam moments, in the framework's own types."""

StepMetrics = Mapping[str, SupportsFloat]
"""Metrics of one step: `loss` (nats per token), `grad_norm` (before clipping) and `updates` (Adam's count). `float`
waits for that step, but not for steps dispatched after it."""

TrainStep = Callable[[State, Batch, float], tuple[State, StepMetrics]]
"""(state, batch on the host, learning rate) -> new state, metrics. If the loss or the gradient norm is not finite, the
parameters, the moments and Adam's count do not change. The old state must not be used again. A batch that fails
`Batch.check` is refused with an InputError."""

Model = Any
"""A framework's MiniLLM."""

EvalStep = Callable[[Batch], Any]
"""batch on the host -> the loss in nats of every target (B, T), without its weight, at least float32, as an array that
numpy can read."""


class Backend(Protocol):
    """The names of a framework package that minillm_core uses."""

    FRAMEWORK: str
    Generator: Any

    def init_state(self, config: RunConfig) -> State: ...
    def import_state(self, config: RunConfig, state: TrainingState, updates: int) -> State: ...
    def export_state(self, config: RunConfig, state: State) -> TrainingState: ...
    def model_of(self, config: RunConfig, state: State) -> Model: ...
    def make_train_step(self, config: RunConfig) -> TrainStep: ...
    def make_eval_step(self, model: Model, *, deterministic: bool = False) -> EvalStep: ...
    def start_payload(self, folder: Path, config: RunConfig, state: State) -> Callable[[], None]: ...
    def write_payload(self, folder: Path, config: RunConfig, state: TrainingState) -> None: ...
    def read_payload(self, checkpoint: Path, config: RunConfig) -> TrainingState: ...
    def open_weights(self, checkpoint: Path, config: RunConfig) -> LazyTensors: ...
    def load(self, path: str | Path, dtype: str = "float32") -> Model: ...
    def from_weights(self, config: ModelConfig, weights: Tensors, dtype: str = "float32") -> Model: ...
    def trace(self, config: ModelConfig, weights: Tensors, tokens_BT: np.ndarray, dtype: str) -> Trace: ...
    def count_params(self, config: ModelConfig) -> int: ...
    def count_forward_flops(self, config: ModelConfig, batch: int, seq_len: int) -> int: ...
    def describe_attention(self, config: RunConfig) -> str: ...
    def auto_dtype(self) -> str: ...
    def describe_device(self) -> str: ...


def load_backend(framework: str) -> Backend:
    """Imports the package of a framework (`jax` or `torch`) and returns it.

    Raises:
        InputError: there is no such framework, or it is not installed.
    """
    if framework not in FRAMEWORKS:
        raise InputError("unknown framework", expected=" or ".join(FRAMEWORKS), found=repr(framework))
    try:
        with progress(f"loading {framework}", None, "module"):
            return cast(Backend, importlib.import_module(f"minillm_{framework}"))
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("minillm"):
            raise
        raise missing_package(error, "torch" if framework == "torch" else None) from error
