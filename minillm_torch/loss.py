"""Cross-entropy: per token, weighted sums over a batch, and a function without gradients for evaluation.

Shapes: B batch, T time, D width, V vocabulary, R rows of a chunk.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minillm_core.data.batches import Batch
from minillm_core.training.backend import EvalStep
from minillm_torch.device import to_device, use_deterministic_algorithms
from minillm_torch.model import MiniLLM, check_tokens
from minillm_torch.precision import at_least_float32

TOKENS_PER_CHUNK = 2048
"""The float32 logits of a chunk take 262 MB with a vocabulary of 32,000. Every chunk also reads the head and adds to
its gradient, so chunks must not be small."""


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, (B, T), in at least float32."""
    logits_BTV = logits_BTV.to(at_least_float32(logits_BTV.dtype))
    target_BT = torch.gather(logits_BTV, -1, targets_BT[..., None])[..., 0]
    return torch.logsumexp(logits_BTV, dim=-1) - target_BT


def head_losses(model: MiniLLM, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """`token_losses` of the output head's logits, (B, T), without ever holding all logits.

    The tokens are cut into chunks. The backward pass computes the logits of each chunk a second time, so memory does
    not grow with B x T x V. A batch of one chunk is computed directly.
    """
    B, T, D = x_BTD.shape
    if B * T <= TOKENS_PER_CHUNK:
        return token_losses(model.head(x_BTD), targets_BT)
    n_chunks = -(-B * T // TOKENS_PER_CHUNK)
    rows = -(-B * T // n_chunks)  # chunks of nearly equal size
    chunks = zip(x_BTD.reshape(-1, D).split(rows), targets_BT.reshape(-1).split(rows), strict=True)

    def losses_of(x_RD: Tensor, targets_R: Tensor) -> Tensor:
        return token_losses(model.head(x_RD), targets_R)

    losses = [checkpoint(losses_of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(losses).reshape(B, T)


def batch_losses(model: MiniLLM, batch: Batch, *, remat: bool = False) -> Tensor:
    """The loss of every target of a batch in nats, without its weight, (B, T)."""
    tokens_BT = check_tokens(model.config, batch.tokens_BT)
    layout = {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}
    x_BTD, _ = model.model(tokens_BT, None, **layout, remat=remat)
    return head_losses(model, x_BTD, batch.targets_BT)


def loss_sums(model: MiniLLM, batch: Batch, *, remat: bool = False) -> tuple[Tensor, Tensor]:
    """The weighted sum of a batch's losses in nats, and the sum of its weights.

    Sums of several batches may be added; their mean is the first sum divided by the second.
    """
    losses_BT = batch_losses(model, batch, remat=remat)
    weights_BT = batch.weights_BT.to(losses_BT.dtype)
    return (losses_BT * weights_BT).sum(), weights_BT.sum()


def mean_loss(model: MiniLLM, batch: Batch) -> Tensor:
    """The weighted mean of a batch's losses in nats."""
    loss, weight = loss_sums(model, batch)
    return loss / weight


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
