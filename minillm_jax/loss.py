"""Cross-entropy: per token, weighted sums over a batch, and a compiled function for evaluation.

Shapes: B batch, T time, D width, V vocabulary, C chunks, R rows of a chunk.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from minillm_core.data.batches import Batch
from minillm_core.training.backend import EvalStep
from minillm_jax.device import compiler_options, target_device
from minillm_jax.model import MiniLLM, check_tokens
from minillm_jax.precision import at_least_float32
from minillm_jax.weights import Params, merge_model, split_model

jax.tree_util.register_dataclass(
    Batch,
    data_fields=[field.name for field in dataclasses.fields(Batch)],
    meta_fields=[],
)

TOKENS_PER_CHUNK = 2048
"""The float32 logits of a chunk take 262 MB with a vocabulary of 32,000. Every chunk also reads the head and adds to
its gradient, so chunks must not be small."""


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, (B, T), in at least float32."""
    logits_BTV = logits_BTV.astype(at_least_float32(logits_BTV.dtype))
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


def head_losses(model: MiniLLM, x_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """`token_losses` of the output head's logits, (B, T), without ever holding all logits.

    The tokens are cut into chunks. The backward pass computes the logits of each chunk a second time, so memory does
    not grow with B x T x V. A batch of one chunk is computed directly.
    """
    B, T, D = x_BTD.shape
    if B * T <= TOKENS_PER_CHUNK:
        return token_losses(model.head(x_BTD), targets_BT)
    n_chunks = -(-B * T // TOKENS_PER_CHUNK)
    rows = -(-B * T // n_chunks)  # chunks of nearly equal size
    padding = n_chunks * rows - B * T
    x_CRD = jnp.pad(x_BTD.reshape(-1, D), ((0, padding), (0, 0))).reshape(n_chunks, rows, D)
    targets_CR = jnp.pad(targets_BT.reshape(-1), (0, padding)).reshape(n_chunks, rows)

    @jax.checkpoint
    def losses_of(x_RD: jax.Array, targets_R: jax.Array) -> jax.Array:
        return token_losses(model.head(x_RD), targets_R)

    losses_CR = jax.lax.map(lambda chunk: losses_of(*chunk), (x_CRD, targets_CR))
    return losses_CR.reshape(-1)[: B * T].reshape(B, T)


def batch_losses(model: MiniLLM, batch: Batch, *, remat: bool = False) -> jax.Array:
    """The loss of every target of a batch in nats, without its weight, (B, T)."""
    tokens_BT = check_tokens(model.config, batch.tokens_BT)
    layout = {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}
    x_BTD, _ = model.model(tokens_BT, None, **layout, remat=remat)
    return head_losses(model, x_BTD, batch.targets_BT)


def loss_sums(model: MiniLLM, batch: Batch, *, remat: bool = False) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of a batch's losses in nats, and the sum of its weights.

    Sums of several batches may be added; their mean is the first sum divided by the second.
    """
    losses_BT = batch_losses(model, batch, remat=remat)
    weights_BT = batch.weights_BT.astype(losses_BT.dtype)
    return (losses_BT * weights_BT).sum(), weights_BT.sum()


def mean_loss(model: MiniLLM, batch: Batch) -> jax.Array:
    """The weighted mean of a batch's losses in nats."""
    loss, weight = loss_sums(model, batch)
    return loss / weight


def make_eval_step(model: MiniLLM, *, deterministic: bool = False) -> EvalStep:
    """The compiled function that returns the losses of a batch. See core's EvalStep for its signature."""
    graphdef, params, rope = split_model(model)
    losses = _jit_losses(graphdef, deterministic, target_device())

    def eval_step(batch: Batch) -> jax.Array:
        batch.check(model.config)
        return losses(params, rope, batch)

    return eval_step


@lru_cache
def _jit_losses(graphdef: Any, deterministic: bool, device: jax.Device) -> Callable[..., jax.Array]:
    """The device decides which attention is compiled, so it is part of the key of the cache."""

    def losses(params: Params, rope: Params, batch: Batch) -> jax.Array:
        return batch_losses(merge_model(graphdef, params, rope), batch)

    return jax.jit(losses, compiler_options=compiler_options(deterministic=deterministic))
