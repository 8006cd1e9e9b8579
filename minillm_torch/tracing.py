"""Records what a model computes: every stage, the loss of every token, the gradient of every parameter."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minillm_core.config import ModelConfig
from minillm_core.data.batches import Batch
from minillm_core.model.stages import BACKWARD_PASSES, Trace, stage_names
from minillm_core.progress import progress
from minillm_core.tensors import Tensors
from minillm_torch.attention import Attention
from minillm_torch.device import default_device, to_device
from minillm_torch.loss import mean_loss, token_losses
from minillm_torch.model import MiniLLM
from minillm_torch.precision import param_dtype, resolve_dtype
from minillm_torch.weights import Params, build_model, to_canonical


def trace(config: ModelConfig, weights: Tensors, tokens_BT: np.ndarray, dtype: str) -> Trace:
    """Runs a model with canonical weights on tokens, forward and backward, as training with that `dtype` does."""
    compute_dtype, device = resolve_dtype(dtype), default_device()
    master_dtype = param_dtype(compute_dtype)
    model = build_model(config, weights, param_dtype=master_dtype, compute_dtype=compute_dtype, device=device)
    batch = to_device(Batch.from_tokens(tokens_BT), device)
    names = stage_names(config)
    with progress("running the model in torch", 1 + BACKWARD_PASSES, "pass") as work:
        gradients = to_canonical(config, _backward(model, batch))
        work.advance(BACKWARD_PASSES)
        recorded, losses_BT = _forward(model, batch.tokens_BT)
        stages = {name: recorded[name].double().cpu().numpy().reshape(*tokens_BT.shape, -1) for name in names}
        work.advance()
    return Trace(stages, losses_BT.double().cpu().numpy(), gradients)


@torch.no_grad()
def _forward(model: MiniLLM, tokens_BT: Tensor) -> tuple[Params, Tensor]:
    """Leaves its hooks on the model."""
    recorded: Params = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        recorded[name] = output[0] if isinstance(output, tuple) else output

    def keep_qkv(name: str, qkv: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        output = qkv(*inputs)
        recorded.update({f"{name}.{part}": x for part, x in zip("qkv", output, strict=True)})
        return output

    for name, module in model.named_modules():
        module.register_forward_hook(partial(keep, name))
        if isinstance(module, Attention):
            module.qkv = partial(keep_qkv, name, module.qkv)  # type: ignore[assignment]
    logits_BTV, _ = model(tokens_BT)
    recorded["logits"] = logits_BTV
    return recorded, token_losses(logits_BTV[:, :-1], tokens_BT[:, 1:])


def _backward(model: MiniLLM, batch: Batch) -> Params:
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(mean_loss(model, batch), list(params.values()), materialize_grads=True)
    return dict(zip(params, grads, strict=True))
