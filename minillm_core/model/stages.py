"""The stages of a model, by name: what is recorded and compared on the way from token ids to losses."""

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
"""What is compared of a block, in the order in which it is computed: q and k after their rotation, self_attn and mlp
before they are added to the residual stream, and the block's output."""


def stage_names(config: ModelConfig) -> list[str]:
    """Every stage of a model, in the order in which it is computed."""
    blocks = [f"model.layers.{i}.{stage}".rstrip(".") for i in range(config.n_layers) for stage in BLOCK_STAGES]
    return ["model.embed_tokens", *blocks, "model.norm", "logits"]


@dataclass(frozen=True)
class Trace:
    """What a model computes on its way through tokens (B, T)."""

    stages: Tensors
    """float64 (B, T, width of the stage), by the names of `stage_names`; heads one after the other."""
    losses_BT: np.ndarray
    """Of every token but the first, in nats, float64 (B, T - 1)."""
    gradients: Tensors
    """Of the mean loss, by canonical name."""
