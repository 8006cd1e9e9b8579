"""Cross-entropy. Shapes: B batch, T time, V vocabulary."""

import torch
from torch import Tensor

from minillm_torch.layers import at_least_float32


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, (B, T), in at least float32."""
    logits_BTV = logits_BTV.to(at_least_float32(logits_BTV.dtype))
    target_BT = torch.gather(logits_BTV, -1, targets_BT[..., None])[..., 0]
    return torch.logsumexp(logits_BTV, dim=-1) - target_BT
