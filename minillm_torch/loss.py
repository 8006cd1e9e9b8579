"""Cross-entropy: per token, weighted sums over a batch, and a function without gradients for evaluation.

Shapes: B batch, T time, N = B * T, D width, V vocabulary, R rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minillm_core.data.batches import Batch
from minillm_core.errors import InputError
from minillm_core.training.backend import EvalStep
from minillm_torch.device import to_device, use_deterministic_algorithms
from minillm_torch.layers import matmul, weight_gradient
from minillm_torch.model import MiniLLM, check_tokens
from minillm_torch.precision import at_least_float32, cast

TOKENS_PER_CHUNK = 2048
"""The float32 logits of a chunk take 262 MB with a vocabulary of 32,000. Every chunk also reads the head and adds to
its gradient, so chunks must not be small."""


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, (B, T), in at least float32."""
    logits_BTV = logits_BTV.to(at_least_float32(logits_BTV.dtype))
    target_BT = torch.gather(logits_BTV, -1, targets_BT[..., None])[..., 0]
    return torch.logsumexp(logits_BTV, dim=-1) - target_BT


def losses_and_slopes(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses` of a chunk, and the derivative of their weighted sum by the logits, in the dtype of the logits:
    (softmax(logits) - one_hot(target)) * weight."""
    high_RV = cast(logits_RV, at_least_float32(logits_RV.dtype))
    lse_R = torch.logsumexp(high_RV, dim=-1)
    target_R = torch.gather(high_RV, -1, targets_R[:, None])[:, 0]
    slopes_RV = torch.exp_(high_RV - lse_R[:, None])
    slopes_RV.scatter_add_(1, targets_R[:, None], slopes_RV.new_full((len(targets_R), 1), -1))
    return lse_R - target_R, cast(slopes_RV.mul_(weights_R[:, None]), logits_RV.dtype)


def head_losses(head_VD: Tensor, x_ND: Tensor, targets_N: Tensor) -> Tensor:
    """`token_losses` of the output head's logits, (N,), in chunks: without gradients, it never holds all logits."""
    w_VD = cast(head_VD, x_ND.dtype)
    return torch.cat([token_losses(matmul(x_RD, w_VD), targets_R) for x_RD, targets_R in _chunks(x_ND, targets_N)])


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head_VD: Tensor, x_ND: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        w_VD = cast(head_VD, x_ND.dtype)
        grad_VD = torch.zeros_like(head_VD, dtype=at_least_float32(head_VD.dtype))
        losses: list[Tensor] = []
        grads: list[Tensor] = []
        for x_RD, targets_R, weights_R in _chunks(x_ND, targets_N, weights_N):
            losses_R, slopes_RV = losses_and_slopes(matmul(x_RD, w_VD), targets_R, weights_R)
            grad_VD += weight_gradient(slopes_RV, x_RD)
            losses.append(losses_R)
            grads.append(matmul(slopes_RV, w_VD.T))
        losses_N = torch.cat(losses)
        ctx.save_for_backward(cast(grad_VD, head_VD.dtype), torch.cat(grads), losses_N)
        return (losses_N * weights_N).sum()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            hint = "compute the loss as token_losses(model.head(x), targets)"
            raise InputError("the loss has no second derivatives: its gradients have no graph of their own", hint=hint)
        high = at_least_float32(factor.dtype)  # a factor in 16 bits has an error
        grad_VD, grad_ND, losses_N = ((cast(x, high) * factor).to(x.dtype) for x in ctx.saved_tensors)
        return grad_VD, grad_ND, None, losses_N


def weighted_loss(head_VD: Tensor, x_ND: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """The weighted sum of `head_losses`. The logits of a chunk are computed once: the pass that computes the losses
    computes the gradients of their sum, too, because a chunk's logits are all that both need. There are no second
    derivatives: asking for one raises an InputError.

    Args:
        head_VD: the head's master weights; the product is computed in the dtype of x.
    """
    if torch.is_grad_enabled() and (head_VD.requires_grad or x_ND.requires_grad or weights_N.requires_grad):
        return _WeightedLoss.apply(head_VD, x_ND, targets_N, weights_N)
    return (head_losses(head_VD, x_ND, targets_N) * weights_N).sum()


def _chunks(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Arrays (N, ...) cut into chunks of at most TOKENS_PER_CHUNK rows of nearly equal size: (R, ...) each."""
    N = len(arrays[0])
    n_chunks = max(1, -(-N // TOKENS_PER_CHUNK))
    return zip(*(x.split(-(-N // n_chunks)) for x in arrays), strict=True)


def batch_losses(model: MiniLLM, batch: Batch) -> Tensor:
    """The loss of every target of a batch in nats, without its weight, (B, T)."""
    x_ND = _output(model, batch)
    return head_losses(model.head_weight(), x_ND, batch.targets_BT.reshape(-1)).reshape(batch.targets_BT.shape)


def loss_sums(model: MiniLLM, batch: Batch, *, remat: bool = False) -> tuple[Tensor, Tensor]:
    """The weighted sum of a batch's losses in nats, and the sum of its weights.

    Sums of several batches may be added; their mean is the first sum divided by the second.
    """
    x_ND, weights_N = _output(model, batch, remat=remat), _weights(model, batch)
    return weighted_loss(model.head_weight(), x_ND, batch.targets_BT.reshape(-1), weights_N), weights_N.sum()


def _weights(model: MiniLLM, batch: Batch) -> Tensor:
    """The weights of all targets of a batch, (B * T), in at least float32."""
    return batch.weights_BT.reshape(-1).to(at_least_float32(model.compute_dtype))


def _output(model: MiniLLM, batch: Batch, *, remat: bool = False) -> Tensor:
    """The decoder's output for all tokens of a batch, (B * T, D)."""
    tokens_BT = check_tokens(model.config, batch.tokens_BT)
    layout = {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}
    x_BTD, _ = model.model(tokens_BT, None, **layout, remat=remat)
    return x_BTD.reshape(-1, x_BTD.shape[-1])


def mean_loss(model: MiniLLM, batch: Batch) -> Tensor:
    """The weighted mean of a batch's losses in nats.

    The weights are divided, not the sum: a gradient in 16 bits that is scaled afterwards is rounded twice, in the same
    direction. For a sum of 2,044 all gradients were 0.2 % too small.
    """
    x_ND, weights_N = _output(model, batch), _weights(model, batch)
    return weighted_loss(model.head_weight(), x_ND, batch.targets_BT.reshape(-1), weights_N / weights_N.sum())


def make_eval_step(model: MiniLLM, *, deterministic: bool = False) -> EvalStep:
    """The function that returns the losses of a batch. See core's EvalStep for its signature."""
    use_deterministic_algorithms(deterministic)

    def eval_step(batch: Batch) -> Tensor:
        batch.check(model.config)
        return _losses(model, to_device(batch, model.model.norm.weight.device))

    return eval_step


@torch.inference_mode()
def _losses(model: MiniLLM, batch: Batch) -> Tensor:
    return batch_losses(model, batch).cpu()
