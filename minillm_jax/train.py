"""Train state and train step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minillm_core.config import RunConfig
from minillm_core.data.batches import Batch
from minillm_core.model.params import init_params
from minillm_core.training.backend import StepMetrics, TrainStep
from minillm_core.training.checkpoints import TrainingState
from minillm_jax.device import compiler_options, deterministic_kernels
from minillm_jax.loss import loss_sums
from minillm_jax.model import MiniLLM
from minillm_jax.optim import apply_update, clip_by_global_norm, make_optimizer
from minillm_jax.payload import start_writing
from minillm_jax.precision import param_dtype, resolve_dtype
from minillm_jax.weights import Params, from_canonical, merge_model, model_structure, to_canonical, unstack_layers

Sums = tuple[jax.Array, jax.Array, Params]
"""The weighted sum of losses, the sum of weights, and the gradients of the first."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters and Adam moments. A step returns a new state and reuses the memory of the old one."""

    params: Params
    opt_state: optax.OptState


def init_state(config: RunConfig) -> TrainState:
    """The state before the first step: core's initial weights, zero moments."""
    return import_state(config, TrainingState(init_params(config.model, config.train.seed), {}, {}), 0)


def import_state(config: RunConfig, state: TrainingState, updates: int) -> TrainState:
    """The state after `updates` updates, from framework-free tensors; without moments, Adam restarts from zero."""
    dtype = param_dtype(resolve_dtype(config.train.compute_dtype))
    load = partial(from_canonical, config.model, dtype=dtype, scan_layers=config.train.scan_layers)
    params = load(state.weights)
    opt_state = make_optimizer(config.optim, config.model).init(params)
    if state.exp_avg:
        mu, nu = load(state.exp_avg), load(state.exp_avg_sq)
        opt_state = (opt_state[0]._replace(count=jnp.asarray(updates, jnp.int32), mu=mu, nu=nu), *opt_state[1:])
    return TrainState(params, opt_state)


def export_state(config: RunConfig, state: TrainState) -> TrainingState:
    """The framework-free tensors of a state."""
    return TrainingState(
        **{group: to_canonical(config.model, params) for group, params in _groups(config, state).items()}
    )


def start_payload(folder: Path, config: RunConfig, state: TrainState) -> Callable[[], None]:
    """Copies the state off the device and starts writing it; the returned function waits until it is written."""
    return start_writing(folder, config.model, _groups(config, state))


def _groups(config: RunConfig, state: TrainState) -> dict[str, Params]:
    """Parameters and both Adam moments, by the names of the groups in a checkpoint. With `scan_layers`, copies on the
    host: a device has no room for a second state."""
    adam = state.opt_state[0]
    groups = {"weights": state.params, "exp_avg": adam.mu, "exp_avg_sq": adam.nu}
    if not config.train.scan_layers:
        return groups
    return {
        group: unstack_layers({path: np.array(array) for path, array in params.items()})
        for group, params in groups.items()
    }


def model_of(config: RunConfig, state: TrainState) -> MiniLLM:
    """The model inside a state, valid until the next step."""
    dtype = resolve_dtype(config.train.compute_dtype)
    graphdef, rope = model_structure(config.model, param_dtype=param_dtype(dtype), compute_dtype=dtype)
    return merge_model(graphdef, unstack_layers(state.params), rope)


def make_train_step(config: RunConfig) -> TrainStep:
    """The compiled step: losses -> accumulated gradients -> clip -> AdamW. See core's TrainStep for its signature."""
    step, rope = jit_train_step(config)
    n_micro = config.train.grad_accum

    def train_step(state: TrainState, batch: Batch, learning_rate: float) -> tuple[TrainState, StepMetrics]:
        batch.check(config.model, n_micro)
        return step(state, rope, batch, learning_rate)

    return train_step


def jit_train_step(config: RunConfig) -> tuple[Any, Params]:
    """The step as `jax.jit` returns it, before it is compiled, and the model's constants, which are its second
    argument."""
    dtype = resolve_dtype(config.train.compute_dtype)
    graphdef, rope = model_structure(
        config.model, param_dtype=param_dtype(dtype), compute_dtype=dtype, scan_layers=config.train.scan_layers
    )
    optimizer = make_optimizer(config.optim, config.model)
    n_micro = config.train.grad_accum

    def gradients_of(params: Params, rope: Params, batch: Batch) -> Sums:
        def sums(params: Params) -> tuple[jax.Array, jax.Array]:
            return loss_sums(merge_model(graphdef, params, rope), batch, remat=config.train.remat)

        (loss, weight), grads = jax.value_and_grad(sums, has_aux=True)(params)
        return loss, weight, grads

    def accumulate(params: Params, rope: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """The mean loss of all micro-batches and its gradients: sums and weights are added, then divided once."""
        if n_micro == 1:
            loss, weight, grads = gradients_of(params, rope, batch)
        else:

            def add(total: Sums, micro: Batch) -> tuple[Sums, None]:
                return jax.tree.map(jnp.add, total, gradients_of(params, rope, micro)), None

            zero = jnp.zeros((), param_dtype(dtype))
            micros = jax.tree.map(lambda x: x.reshape(n_micro, -1, x.shape[1]), batch)
            (loss, weight, grads), _ = jax.lax.scan(add, (zero, zero, jax.tree.map(jnp.zeros_like, params)), micros)
        return loss / weight, {path: grad / weight for path, grad in grads.items()}

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler_options(deterministic=config.train.deterministic))
    def step(
        state: TrainState, rope: Params, batch: Batch, learning_rate: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        with deterministic_kernels(config.train.deterministic):
            loss, grads = accumulate(state.params, rope, batch)
        grads, grad_norm = clip_by_global_norm(grads, config.optim.grad_clip)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = apply_update(optimizer, state.params, grads, state.opt_state, learning_rate, finite)
        return TrainState(params, opt_state), {"loss": loss, "grad_norm": grad_norm, "updates": opt_state[0].count}

    return step, rope
