"""Cross-entropy: per token, weighted sums over a batch, and a compiled function for evaluation.

Shapes: B batch, T time, N = B * T, D width, V vocabulary, C chunks, R rows of a chunk.
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
from minillm_jax.layers import matmul
from minillm_jax.model import MiniLLM, check_tokens
from minillm_jax.precision import at_least_float32, precision_of
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


def losses_and_slopes(logits_RV: jax.Array, targets_R: jax.Array, weights_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`token_losses` of a chunk, and the derivative of their weighted sum by the logits, in the dtype of the logits:
    (softmax(logits) - one_hot(target)) * weight."""
    high_RV = logits_RV.astype(at_least_float32(logits_RV.dtype))
    lse_R = jax.nn.logsumexp(high_RV, axis=-1)
    target_R = jnp.take_along_axis(high_RV, targets_R[:, None], axis=-1)[:, 0]
    is_target_RV = jnp.arange(logits_RV.shape[1], dtype=targets_R.dtype) == targets_R[:, None]
    slopes_RV = (jnp.exp(high_RV - lse_R[:, None]) - is_target_RV) * weights_R[:, None]
    return lse_R - target_R, slopes_RV.astype(logits_RV.dtype)


def head_losses(head_VD: jax.Array, x_ND: jax.Array, targets_N: jax.Array) -> jax.Array:
    """`token_losses` of the output head's logits, (N,), in chunks: without gradients, it never holds all logits."""
    w_DV = head_VD.astype(x_ND.dtype).T
    chunks = _chunks(x_ND, targets_N)
    return jax.lax.map(lambda chunk: token_losses(matmul(chunk[0], w_DV), chunk[1]), chunks).reshape(-1)[: len(x_ND)]


@jax.custom_vjp
def weighted_loss(head_VD: jax.Array, x_ND: jax.Array, targets_N: jax.Array, weights_N: jax.Array) -> jax.Array:
    """The weighted sum of `head_losses`. The logits of a chunk are computed once: the pass that computes the losses
    computes the gradients of their sum, too, because a chunk's logits are all that both need. There is no forward-mode
    derivative (`jax.jvp`).

    Args:
        head_VD: the head's master weights; the product is computed in the dtype of x.
    """
    return (head_losses(head_VD, x_ND, targets_N) * weights_N).sum()


def _weighted_loss_forward(
    head_VD: jax.Array, x_ND: jax.Array, targets_N: jax.Array, weights_N: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    w_VD, N = head_VD.astype(x_ND.dtype), len(x_ND)

    def add(grad_VD: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x_RD, targets_R, weights_R = chunk
        losses_R, slopes_RV = losses_and_slopes(matmul(x_RD, w_VD.T), targets_R, weights_R)
        grad_VD += jnp.matmul(
            slopes_RV.T, x_RD, precision=precision_of(x_RD.dtype), preferred_element_type=grad_VD.dtype
        )
        return grad_VD, (losses_R, matmul(slopes_RV, w_VD))

    zero_VD = jnp.zeros(head_VD.shape, at_least_float32(head_VD.dtype))
    grad_VD, (losses_CR, grad_CRD) = jax.lax.scan(add, zero_VD, _chunks(x_ND, targets_N, weights_N))
    losses_N, grad_ND = losses_CR.reshape(-1)[:N], grad_CRD.reshape(-1, x_ND.shape[1])[:N]
    return (losses_N * weights_N).sum(), (grad_VD.astype(head_VD.dtype), grad_ND, losses_N)


def _weighted_loss_backward(gradients: tuple[jax.Array, ...], factor: jax.Array) -> tuple[jax.Array | None, ...]:
    grad_VD, grad_ND, losses_N = ((x * factor).astype(x.dtype) for x in gradients)  # a factor in 16 bits has an error
    return grad_VD, grad_ND, None, losses_N


weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _chunks(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays (N, ...) cut into chunks of at most TOKENS_PER_CHUNK rows of nearly equal size: (C, R, ...). Rows of zeros
    fill the last one."""
    N = len(arrays[0])
    C = max(1, -(-N // TOKENS_PER_CHUNK))
    R = -(-N // C)
    padded = (jnp.pad(x, ((0, C * R - N), *((0, 0),) * (x.ndim - 1))) for x in arrays)
    return tuple(x.reshape(C, R, *x.shape[1:]) for x in padded)


def batch_losses(model: MiniLLM, batch: Batch) -> jax.Array:
    """The loss of every target of a batch in nats, without its weight, (B, T)."""
    x_ND = _output(model, batch)
    return head_losses(model.head_weight(), x_ND, batch.targets_BT.reshape(-1)).reshape(batch.targets_BT.shape)


def loss_sums(model: MiniLLM, batch: Batch, *, remat: bool = False) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of a batch's losses in nats, and the sum of its weights.

    Sums of several batches may be added; their mean is the first sum divided by the second.
    """
    x_ND, weights_N = _output(model, batch, remat=remat), _weights(model, batch)
    return weighted_loss(model.head_weight(), x_ND, batch.targets_BT.reshape(-1), weights_N), weights_N.sum()


def _weights(model: MiniLLM, batch: Batch) -> jax.Array:
    """The weights of all targets of a batch, (B * T), in at least float32."""
    return batch.weights_BT.reshape(-1).astype(at_least_float32(model.compute_dtype))


def _output(model: MiniLLM, batch: Batch, *, remat: bool = False) -> jax.Array:
    """The decoder's output for all tokens of a batch, (B * T, D)."""
    tokens_BT = check_tokens(model.config, batch.tokens_BT)
    layout = {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}
    x_BTD, _ = model.model(tokens_BT, None, **layout, remat=remat)
    return x_BTD.reshape(-1, x_BTD.shape[-1])


def mean_loss(model: MiniLLM, batch: Batch) -> jax.Array:
    """The weighted mean of a batch's losses in nats.

    The weights are divided, not the sum: a gradient in 16 bits that is scaled afterwards is rounded twice, in the same
    direction. For a sum of 2,044 all gradients were 0.2 % too small.
    """
    x_ND, weights_N = _output(model, batch), _weights(model, batch)
    return weighted_loss(model.head_weight(), x_ND, batch.targets_BT.reshape(-1), weights_N / weights_N.sum())


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
