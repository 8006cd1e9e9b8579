"""Code that is not this project's, as the doctor runs it: a Llama in PyTorch and its engine.

docs/learn/porting.md uses it as the example of "your own code". Replace `my_llama` by your model.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from minillm_core import Engine, ModelConfig, Trace
from minillm_core.tensors import Tensors

Keep = Callable[[str, torch.Tensor], torch.Tensor]
Copies = Callable[[torch.Tensor], torch.Tensor]


def my_llama(
    w: dict[str, torch.Tensor], config: ModelConfig, ids: torch.Tensor, keep: Keep, copies: Copies
) -> torch.Tensor:
    """Your model. The one change: each stage passes through `keep`. `copies` copies the KV heads for GQA."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return keep(name, F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], config.norm_eps))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], -1)

    H = config.resolved_head_dim
    x = keep("model.embed_tokens", w["model.embed_tokens.weight"][ids])
    exponents = -torch.arange(0, H, 2, dtype=x.dtype) / H
    angles = torch.arange(ids.shape[1])[:, None, None] * config.rope_theta**exponents
    for at in (f"model.layers.{i}" for i in range(config.n_layers)):
        attn, mlp, h = f"{at}.self_attn", f"{at}.mlp", norm(x, f"{at}.input_layernorm")
        q, k, v = (linear(h, f"{attn}.{n}_proj").unflatten(-1, (-1, H)) for n in "qkv")
        heads = zip("qkv", (rotated(q), rotated(k), v), strict=True)
        q, k, v = (keep(f"{attn}.{n}", y).transpose(1, 2) for n, y in heads)
        y = F.scaled_dot_product_attention(q, copies(k), copies(v), is_causal=True)
        x = x + keep(attn, linear(y.transpose(1, 2).flatten(2), f"{attn}.o_proj"))
        h = norm(x, f"{at}.post_attention_layernorm")
        y = F.silu(linear(h, f"{mlp}.gate_proj")) * linear(h, f"{mlp}.up_proj")
        x = keep(at, x + keep(mlp, linear(y, f"{mlp}.down_proj")))
    return keep("logits", linear(norm(x, "model.norm"), "lm_head"))


def engine(copies: Copies) -> Engine:
    """What `compare` needs: a function from arrays to the stages, the losses and the gradients, in float64."""

    def run(config: ModelConfig, weights: Tensors, tokens_BT: np.ndarray, dtype: str) -> Trace:
        def keep(name: str, x: torch.Tensor) -> torch.Tensor:
            stages[name] = x.detach().double().flatten(2).numpy()  # (B, T, width)
            return x

        stages: Tensors = {}
        w = {n: torch.tensor(x, dtype=getattr(torch, dtype), requires_grad=True) for n, x in weights.items()}
        ids = torch.from_numpy(tokens_BT).long()
        logits = my_llama(w, config, ids, keep, copies)
        losses = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
        losses.mean().backward()
        gradients = {name: x.grad.double().numpy() for name, x in w.items() if x.grad is not None}
        return Trace(stages, losses.detach().double().numpy(), gradients)

    return Engine("my code", run=lambda folder: run)
