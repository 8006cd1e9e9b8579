"""Cross-entropy: per token, its mean, and a function without gradients for evaluation.

Shapes: B batch, T time, V vocabulary.
"""

import torch
from torch import Tensor

from minillm_core.training.backend import EvalStep
from minillm_torch.device import to_device, use_deterministic_algorithms
from minillm_torch.model import MiniLLM
from minillm_torch.precision import at_least_float32


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, (B, T), in at least float32."""
    logits_BTV = logits_BTV.to(at_least_float32(logits_BTV.dtype))
    target_BT = torch.gather(logits_BTV, -1, targets_BT[..., None])[..., 0]
    return torch.logsumexp(logits_BTV, dim=-1) - target_BT


def mean_loss(model: MiniLLM, tokens_BT: Tensor) -> Tensor:
    """Mean loss in nats of predicting tokens 1 to T - 1 of each row from the tokens before them."""
    logits_BTV, _ = model(tokens_BT[:, :-1])
    return token_losses(logits_BTV, tokens_BT[:, 1:]).mean()


def make_eval_step(model: MiniLLM, *, deterministic: bool = False) -> EvalStep:
    """The function that returns the losses of a batch. See core's EvalStep for its signature."""
    use_deterministic_algorithms(deterministic)
    return lambda tokens_BT: _losses(model, to_device(tokens_BT, model.model.norm.weight.device))


@torch.inference_mode()
def _losses(model: MiniLLM, tokens_BT: Tensor) -> Tensor:
    logits_BTV, _ = model(tokens_BT[:, :-1])
    return token_losses(logits_BTV, tokens_BT[:, 1:]).cpu()
