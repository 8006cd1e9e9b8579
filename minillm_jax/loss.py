"""Cross-entropy: per token, its mean, and a compiled function for evaluation.

Shapes: B batch, T time, V vocabulary.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from minillm_core.training.backend import EvalStep
from minillm_jax.device import compiler_options
from minillm_jax.model import MiniLLM
from minillm_jax.precision import at_least_float32
from minillm_jax.weights import Params, merge_model, split_model


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, (B, T), in at least float32."""
    logits_BTV = logits_BTV.astype(at_least_float32(logits_BTV.dtype))
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


def mean_loss(model: MiniLLM, tokens_BT: jax.Array) -> jax.Array:
    """Mean loss in nats of predicting tokens 1 to T - 1 of each row from the tokens before them."""
    logits_BTV, _ = model(tokens_BT[:, :-1])
    return token_losses(logits_BTV, tokens_BT[:, 1:]).mean()


def make_eval_step(model: MiniLLM, *, deterministic: bool = False) -> EvalStep:
    """The compiled function that returns the losses of a batch. See core's EvalStep for its signature."""
    graphdef, params, rope = split_model(model)
    losses = _jit_losses(graphdef, deterministic)
    return lambda tokens_BT: losses(params, rope, tokens_BT)


@lru_cache
def _jit_losses(graphdef: Any, deterministic: bool) -> Callable[..., jax.Array]:
    def losses(params: Params, rope: Params, tokens_BT: jax.Array) -> jax.Array:
        logits_BTV, _ = merge_model(graphdef, params, rope)(tokens_BT[:, :-1])
        return token_losses(logits_BTV, tokens_BT[:, 1:])

    return jax.jit(losses, compiler_options=compiler_options(deterministic=deterministic))
