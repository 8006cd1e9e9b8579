"""The stages of a model, by name: the intermediate results that are recorded and compared."""

from dataclasses import dataclass

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.tensors import Tensors

BLOCK_STAGES = (
    "input_layernorm",
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn",
    "post_attention_layernorm",
    "mlp",
    "",
)
"""The stages of a block, in the order in which they are computed: q and k after RoPE, self_attn and mlp before they are
added to the residual stream, and "" for the output of the block."""

BACKWARD_PASSES = 3
"""What recording the gradients costs, in forward passes: one for the loss, and two as large for the gradients."""


def stage_names(config: ModelConfig) -> list[str]:
    """The names of all stages of a model, in the order in which they are computed."""
    blocks = [f"model.layers.{i}.{stage}".rstrip(".") for i in range(config.n_layers) for stage in BLOCK_STAGES]
    return ["model.embed_tokens", *blocks, "model.norm", "logits"]


@dataclass(frozen=True)
class Trace:
    """What a model computes for tokens (B, T)."""

    stages: Tensors
    """float64 (B, T, width of the stage), by the names in `stage_names`. Heads are concatenated."""
    losses_BT: np.ndarray
    """The loss of every token except the first, in nats, float64 (B, T - 1)."""
    gradients: Tensors
    """The gradients of the mean loss, by canonical name. Empty if they are not computed."""
