"""Records what a model computes: every stage, the loss of every token, the gradient of every parameter."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from minillm_core.config import ModelConfig
from minillm_core.data.batches import Batch
from minillm_core.model.stages import BACKWARD_PASSES, Trace, stage_names
from minillm_core.progress import progress
from minillm_core.tensors import Tensors
from minillm_jax.loss import mean_loss, token_losses
from minillm_jax.precision import param_dtype, resolve_dtype
from minillm_jax.weights import Params, from_canonical, merge_model, model_structure, to_canonical


def trace(config: ModelConfig, weights: Tensors, tokens_BT: np.ndarray, dtype: str) -> Trace:
    """Runs a model with canonical weights on tokens, forward and backward, as training with that `dtype` does.

    float64 enables JAX's 64-bit mode meanwhile, in this thread only: other threads may serve a model in float32.
    """
    with jax.enable_x64(True) if dtype == "float64" else nullcontext():
        return _trace(config, weights, tokens_BT, dtype)


def _trace(config: ModelConfig, weights: Tensors, tokens_BT: np.ndarray, dtype: str) -> Trace:
    compute_dtype = resolve_dtype(dtype)
    master_dtype = param_dtype(compute_dtype)
    graphdef, rope = model_structure(config, param_dtype=master_dtype, compute_dtype=compute_dtype)
    params = from_canonical(config, weights, master_dtype)
    with progress("running the model in jax", 1 + BACKWARD_PASSES, "pass") as work:
        recorded, losses_BT = _forward(graphdef, params, rope, tokens_BT)
        stages = {
            name: np.asarray(recorded[name], np.float64).reshape(*tokens_BT.shape, -1) for name in stage_names(config)
        }
        work.advance()
        gradients = to_canonical(config, _backward(graphdef, params, rope, Batch.from_tokens(tokens_BT)))
        work.advance(BACKWARD_PASSES)
    return Trace(stages, np.asarray(losses_BT, np.float64), gradients)


@partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, params: Params, rope: Params, tokens_BT: jax.Array) -> tuple[Params, jax.Array]:
    model = merge_model(graphdef, params, rope)
    forward = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
    (logits_BTV, _), outputs = forward(tokens_BT)
    recorded = {"logits": logits_BTV}
    for (*module, method), variable in nnx.to_flat_state(outputs):
        name, (output,) = ".".join(map(str, module)), variable.get_value()
        if method == "qkv":
            recorded |= {f"{name}.{part}": x for part, x in zip("qkv", output, strict=True)}
        elif method == "__call__":
            recorded[name] = output[0] if isinstance(output, tuple) else output
    return recorded, token_losses(logits_BTV[:, :-1], tokens_BT[:, 1:])


@partial(jax.jit, static_argnums=0)
def _backward(graphdef: Any, params: Params, rope: Params, batch: Batch) -> Params:
    return jax.grad(lambda params: mean_loss(merge_model(graphdef, params, rope), batch))(params)
