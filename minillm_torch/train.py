"""Train state, train step, evaluation step."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillm_core.backend import EvalStep, StepMetrics, TrainStep
from minillm_core.checkpoints import Tensors, TrainingState
from minillm_core.config import RunConfig
from minillm_core.params import init_params
from minillm_torch.loss import token_losses
from minillm_torch.model import MiniLLM
from minillm_torch.optim import apply_update, clip_by_global_norm, make_optimizer
from minillm_torch.weights import Params, build_model, from_canonical, to_canonical


@dataclass(frozen=True)
class TrainState:
    """Parameters (in the model) and Adam moments (in the optimizer); a step changes both in place."""

    model: MiniLLM
    optimizer: torch.optim.AdamW


def default_device() -> torch.device:
    """The GPU if there is one; float32 products there are float32 (no TF32), and 16-bit ones accumulate in float32."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda")


def auto_dtype() -> str:
    """What `train.compute_dtype: auto` means here."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of a name, or of `auto`."""
    return getattr(torch, auto_dtype() if name == "auto" else name)


def param_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Master parameters are float32; float64 runs keep them in float64."""
    return torch.promote_types(compute_dtype, torch.float32)


def init_state(config: RunConfig) -> TrainState:
    """The state before the first step: core's initial weights, zero moments."""
    return import_state(config, TrainingState(init_params(config.model, config.train.seed), {}, {}), 0)


def import_state(config: RunConfig, state: TrainingState, updates: int) -> TrainState:
    """A state from framework-free tensors after `updates` updates; without moments, Adam starts anew."""
    compute_dtype = resolve_dtype(config.train.compute_dtype)
    dtype, device = param_dtype(compute_dtype), default_device()
    model = build_model(config.model, state.weights, param_dtype=dtype, compute_dtype=compute_dtype, device=device)
    optimizer = make_optimizer(config.optim, model)
    if state.exp_avg:
        exp_avg = from_canonical(config.model, state.exp_avg, dtype, device)
        exp_avg_sq = from_canonical(config.model, state.exp_avg_sq, dtype, device)
        for path, param in model.named_parameters():
            count = torch.tensor(float(updates), device=device)
            optimizer.state[param] = {"step": count, "exp_avg": exp_avg[path], "exp_avg_sq": exp_avg_sq[path]}
    return TrainState(model, optimizer)


def export_state(config: RunConfig, state: TrainState) -> TrainingState:
    """The framework-free tensors of a state."""
    params = dict(state.model.named_parameters())
    adam = state.optimizer.state

    def export(params: Params) -> Tensors:
        return to_canonical(config.model, params)

    def moment(name: str) -> Params:
        return {path: adam[param][name] if param in adam else torch.zeros_like(param) for path, param in params.items()}

    return TrainingState(export(params), export(moment("exp_avg")), export(moment("exp_avg_sq")))


def model_of(config: RunConfig, state: TrainState) -> MiniLLM:
    """The model inside a state, valid until the next step."""
    return state.model


def mean_loss(model: MiniLLM, tokens_BT: Tensor) -> Tensor:
    """Mean loss in nats of predicting tokens 1 to T - 1 of each row from those before."""
    logits_BTV, _ = model(tokens_BT[:, :-1])
    return token_losses(logits_BTV, tokens_BT[:, 1:]).mean()


def make_train_step(config: RunConfig) -> TrainStep:
    """The step: loss -> accumulated gradients -> clip -> AdamW. See core's TrainStep for its signature."""
    _use_deterministic_algorithms(config.train.deterministic)
    n_micro = config.train.grad_accum

    def accumulate(model: MiniLLM, tokens_BT: Tensor) -> Tensor:
        total = torch.zeros((), device=tokens_BT.device)
        for micro_BT in tokens_BT.chunk(n_micro):
            loss = mean_loss(model, micro_BT) / n_micro
            loss.backward()
            total = total + loss.detach()
        return total

    def step(state: TrainState, tokens_BT: np.ndarray, learning_rate: float) -> tuple[TrainState, StepMetrics]:
        loss = accumulate(state.model, _to_device(tokens_BT, state.model))
        grads: Params = {path: param.grad for path, param in state.model.named_parameters()}
        _, grad_norm = clip_by_global_norm(grads, config.optim.grad_clip)
        apply_update(state.optimizer, learning_rate, torch.isfinite(loss) & torch.isfinite(grad_norm))
        updates = state.optimizer.state[next(state.model.parameters())]["step"].clone()
        return state, _to_host({"loss": loss, "grad_norm": grad_norm, "updates": updates})

    return step


def make_eval_step(model: MiniLLM, *, deterministic: bool = False) -> EvalStep:
    """The losses of a batch. See core's EvalStep for its signature."""
    _use_deterministic_algorithms(deterministic)
    return lambda tokens_BT: _losses(model, _to_device(tokens_BT, model))


@torch.inference_mode()
def _losses(model: MiniLLM, tokens_BT: Tensor) -> Tensor:
    logits_BTV, _ = model(tokens_BT[:, :-1])
    return token_losses(logits_BTV, tokens_BT[:, 1:]).cpu()


def _to_device(tokens_BT: np.ndarray, model: MiniLLM) -> Tensor:
    """A batch on the model's device, without waiting for a GPU to be idle."""
    tensor = torch.from_numpy(tokens_BT).long()
    device = model.model.norm.weight.device
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _HostScalar:
    """A number on its way from a GPU, read without waiting for what was launched after it."""

    def __init__(self, value: Tensor):
        self._copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._copy.copy_(value, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def __float__(self) -> float:
        self._copied.synchronize()
        return float(self._copy)


def _to_host(metrics: dict[str, Tensor]) -> StepMetrics:
    return {name: _HostScalar(value) if value.is_cuda else value for name, value in metrics.items()}


def _use_deterministic_algorithms(deterministic: bool) -> None:
    """The same bits in every run on one kind of GPU; a setting of the process, which stays."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)


def describe_device() -> str:
    """Framework and device, for the log."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {device}"
