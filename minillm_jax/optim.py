"""Clipping by the global norm and AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from minillm_core.config import ModelConfig, OptimConfig
from minillm_core.model.params import param_table
from minillm_jax.weights import LAYER, Params, param_paths


def make_optimizer(config: OptimConfig, model: ModelConfig) -> optax.GradientTransformation:
    """AdamW without the learning rate: `update` gives a direction, which `apply_update` scales and subtracts."""
    decays = {param_paths(model)[name]: spec.decays for name, spec in param_table(model).items()}
    decays |= {LAYER.sub("", path): value for path, value in decays.items()}  # for `scan_layers`
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: {path: decays[path] for path in params}),
    )


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, jax.Array]:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)); returns them and the norm before clipping."""
    norm = optax.tree.norm(grads)
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return {path: grad * factor for path, grad in grads.items()}, norm


def apply_update(
    optimizer: optax.GradientTransformation,
    params: Params,
    grads: Params,
    opt_state: optax.OptState,
    learning_rate: jax.Array | float,
    finite: jax.Array | bool,
) -> tuple[Params, optax.OptState]:
    """One AdamW update: returns new parameters and moments, or the given ones if `finite` is false."""
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    new_params = {path: param - learning_rate * updates[path] for path, param in params.items()}
    return jax.tree.map(partial(jnp.where, finite), (new_params, new_opt_state), (params, opt_state))
