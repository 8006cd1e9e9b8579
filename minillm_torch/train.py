"""Train state and train step."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillm_core.config import RunConfig
from minillm_core.data.batches import Batch
from minillm_core.model.params import init_params
from minillm_core.training.backend import StepMetrics, TrainStep
from minillm_core.training.checkpoints import TrainingState
from minillm_torch.device import compiled, default_device, to_device, to_host, use_deterministic_algorithms
from minillm_torch.loss import loss_sums
from minillm_torch.model import MiniLLM
from minillm_torch.optim import apply_update, clip_by_global_norm, make_optimizer
from minillm_torch.payload import start_writing
from minillm_torch.precision import param_dtype, resolve_dtype
from minillm_torch.weights import Params, build_model, from_canonical, to_canonical


@dataclass(frozen=True)
class TrainState:
    """Parameters (in the model) and Adam moments (in the optimizer). A step changes both in place."""

    model: MiniLLM
    optimizer: torch.optim.AdamW


def init_state(config: RunConfig) -> TrainState:
    """The state before the first step: core's initial weights, zero moments."""
    return import_state(config, TrainingState(init_params(config.model, config.train.seed), {}, {}), 0)


def import_state(config: RunConfig, state: TrainingState, updates: int) -> TrainState:
    """The state after `updates` updates, from framework-free tensors; without moments, Adam restarts from zero."""
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
    return TrainingState(**{group: to_canonical(config.model, params) for group, params in _groups(state).items()})


def start_payload(folder: Path, config: RunConfig, state: TrainState) -> Callable[[], None]:
    """Copies the state off the device; the returned function writes the copy."""
    groups = {
        group: {path: param.detach().to("cpu", copy=True).numpy() for path, param in params.items()}
        for group, params in _groups(state).items()
    }
    return start_writing(folder, config.model, groups)


def _groups(state: TrainState) -> dict[str, Params]:
    """Parameters and both Adam moments, by the names of the groups in a checkpoint."""
    params, adam = dict(state.model.named_parameters()), state.optimizer.state

    def moment(name: str) -> Params:
        return {path: adam[param][name] if param in adam else torch.zeros_like(param) for path, param in params.items()}

    return {"weights": params, "exp_avg": moment("exp_avg"), "exp_avg_sq": moment("exp_avg_sq")}


def model_of(config: RunConfig, state: TrainState) -> MiniLLM:
    """The model inside a state, valid until the next step."""
    return state.model


def make_train_step(config: RunConfig) -> TrainStep:
    """The step: losses -> accumulated gradients -> clip -> AdamW. See core's TrainStep for its signature."""
    use_deterministic_algorithms(config.train.deterministic)
    n_micro = config.train.grad_accum
    compiles = config.train.torch_compile and default_device().type == "cuda"
    sums = compiled(loss_sums) if compiles else loss_sums

    def accumulate(model: MiniLLM, batch: Batch) -> tuple[Tensor, Params]:
        """The mean loss of all micro-batches and its gradients: sums and weights are added, then divided once."""
        model.zero_grad(set_to_none=True)  # of a step that failed, or of the user's own backward pass
        total_loss = total_weight = torch.zeros((), device=batch.tokens_BT.device)
        for micro in _micro_batches(batch, n_micro):
            loss, weight = sums(model, micro, remat=config.train.remat)
            loss.backward()
            total_loss, total_weight = total_loss + loss.detach(), total_weight + weight
        grads: Params = {path: param.grad for path, param in model.named_parameters()}
        torch._foreach_div_([*grads.values()], total_weight)
        return total_loss / total_weight, grads

    def step(state: TrainState, batch: Batch, learning_rate: float) -> tuple[TrainState, StepMetrics]:
        loss, grads = accumulate(state.model, batch)
        _, grad_norm = clip_by_global_norm(grads, config.optim.grad_clip)
        apply_update(state.optimizer, learning_rate, torch.isfinite(loss) & torch.isfinite(grad_norm))
        updates = state.optimizer.state[next(state.model.parameters())]["step"].clone()
        return state, to_host({"loss": loss, "grad_norm": grad_norm, "updates": updates})

    def train_step(state: TrainState, batch: Batch, learning_rate: float) -> tuple[TrainState, StepMetrics]:
        batch.check(config.model, n_micro)
        return step(state, to_device(batch, state.model.model.norm.weight.device), learning_rate)

    return train_step


def _micro_batches(batch: Batch, n_micro: int) -> Iterator[Batch]:
    """The rows of a batch in n_micro parts of equal size."""
    given = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    parts = {name: x.reshape(n_micro, -1, x.shape[1]) for name, x in given.items() if x is not None}
    for i in range(n_micro):
        yield Batch(**{name: part[i] for name, part in parts.items()})
