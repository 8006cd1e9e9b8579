"""Clipping by the global norm and AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

import torch
from torch import Tensor

from minillm_core.config import OptimConfig
from minillm_core.model.params import param_table
from minillm_torch.model import MiniLLM
from minillm_torch.weights import Params, param_paths


def make_optimizer(config: OptimConfig, model: MiniLLM) -> torch.optim.AdamW:
    """AdamW over the model's parameters; the learning rate is set at every update."""
    params, table = dict(model.named_parameters()), param_table(model.config)
    decays = {path: table[name].decays for name, path in param_paths(model.config).items()}
    groups = [
        {"params": [params[path] for path in decays if decays[path]], "weight_decay": config.weight_decay},
        {"params": [params[path] for path in decays if not decays[path]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, Tensor]:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)), in place; returns them and the norm before clipping."""
    tensors = [*grads.values()]
    if tensors[0].is_cuda:
        norm = torch.stack(torch._foreach_norm(tensors)).square().sum().sqrt()  # one kernel for many tensors
    else:
        # On a CPU, the float32 norm of a whole tensor was off by 2e-5 over 4 M gradients, and clipping keeps the error.
        # The norms of rows are exact (3e-8 over 50 M gradients), and take a third of the time of `square().sum()`.
        norm = torch.stack([torch.linalg.vector_norm(grad, dim=-1).square().sum() for grad in tensors]).sum().sqrt()
    torch._foreach_mul_(tensors, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return grads, norm


def apply_update(optimizer: torch.optim.AdamW, learning_rate: float, finite: Tensor) -> None:
    """One AdamW update from the parameters' `.grad`: changes parameters and moments in place, if `finite` is true."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # The fused kernel reads these two on the device, so the host does not wait.
    optimizer.found_inf, optimizer.grad_scale = (~finite).float(), None  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
