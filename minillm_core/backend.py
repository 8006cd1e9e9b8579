"""What the train loop asks of a framework: the common public names of minillm_jax and minillm_torch."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from minillm_core.checkpoints import TrainingState
from minillm_core.config import ModelConfig, RunConfig
from minillm_core.errors import InputError

State = Any
"""Parameters and Adam moments, as the framework keeps them."""

TrainStep = Callable[[State, np.ndarray, float], tuple[State, dict[str, Any]]]
"""(state, tokens (batch_size, seq_len + 1), learning rate) -> new state, and on the device `loss` (nats per token) and
`grad_norm` (before clipping). The old state must not be used again."""

Model = Any
"""A framework's MiniLLM."""

EvalStep = Callable[[np.ndarray, np.ndarray], Any]
"""(tokens (B, S + 1), mask (B, S)) -> the sum of the masked targets' losses in nats, on the device."""


class Backend(Protocol):
    """A framework package, as core sees it."""

    FRAMEWORK: str
    Generator: Any

    def init_state(self, config: RunConfig) -> State: ...
    def import_state(self, config: RunConfig, state: TrainingState, step: int) -> State: ...
    def export_state(self, config: RunConfig, state: State) -> TrainingState: ...
    def model_of(self, config: RunConfig, state: State) -> Model: ...
    def make_train_step(self, config: RunConfig) -> TrainStep: ...
    def make_eval_step(self, model: Model) -> EvalStep: ...
    def start_payload(self, folder: Path, config: RunConfig, state: State) -> Callable[[], None]: ...
    def write_payload(self, folder: Path, config: RunConfig, state: TrainingState) -> None: ...
    def read_payload(self, checkpoint: Path, config: RunConfig, *, moments: bool) -> TrainingState: ...
    def load(self, path: str | Path, dtype: str = "float32") -> Model: ...
    def count_params(self, config: ModelConfig) -> int: ...
    def count_forward_flops(self, config: ModelConfig, batch: int, seq_len: int) -> int: ...
    def describe_device(self) -> str: ...


def load_backend(framework: str) -> Backend:
    """The package of a framework, imported when asked for by name.

    Raises:
        InputError: the framework is not installed.
    """
    try:
        return cast(Backend, importlib.import_module(f"minillm_{framework}"))
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("minillm"):
            raise
        raise InputError(
            f"{framework} is not installed", found=f"no module {error.name}", do=f"pip install -e '.[{framework}]'"
        ) from error
