"""The model once more, in plain numpy and float64: what a configuration and weights mean, by neither framework.

It computes stage by stage, no further than it is asked, and its parts can be replaced by wrong ones (faults.py): so it
tells which of two models that differ is wrong, and how.

Shapes: B batch, T query time, S key time, D width, N query heads, K key/value heads, G = N / K, H head dim.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.rope import inverse_frequencies

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


def silu(x: np.ndarray) -> np.ndarray:
    return x * np.exp(-np.logaddexp(0, -x))


def half_split_rotation(x_BTNH: np.ndarray, cos_T1H: np.ndarray, sin_T1H: np.ndarray) -> np.ndarray:
    """Channel i turns together with channel i + H/2."""
    first, second = np.split(x_BTNH, 2, axis=-1)
    return np.concatenate([first * cos_T1H - second * sin_T1H, second * cos_T1H + first * sin_T1H], axis=-1)


@dataclass(frozen=True)
class Reference:
    """A model: its configuration, its weights and, at their right values, the choices that an implementation makes."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    frequencies: np.ndarray | None = None
    """Radians per position of each channel pair, (H/2,); by default those of the configuration."""
    rotation: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] = half_split_rotation
    activation: Callable[[np.ndarray], np.ndarray] = silu
    attention_scale: float | None = None
    """By default 1 / sqrt(H)."""
    tiled_groups: bool = False
    """Query head n reads KV head n % K, and not n // G."""
    sees_future: bool = False
    embedding_scale: float = 1.0
    final_norm: bool = True

    def stages(self, tokens_BT: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Name and value of every stage in `stage_names`, as in a Trace, each computed when it is asked for."""
        config, w = self.config, self.weights
        B, T = tokens_BT.shape
        K, H = config.n_kv_heads, config.resolved_head_dim
        frequencies = inverse_frequencies(config) if self.frequencies is None else self.frequencies
        angles_T1H = np.arange(T, dtype=np.float64)[:, None, None] * frequencies
        turn = np.cos(angles_T1H), np.sin(angles_T1H)
        scale = H**-0.5 if self.attention_scale is None else self.attention_scale
        visible_TS = np.tri(T, dtype=bool) | self.sees_future

        def norm(x_BTD: np.ndarray, name: str) -> np.ndarray:
            mean_square = np.mean(x_BTD * x_BTD, axis=-1, keepdims=True)
            return x_BTD / np.sqrt(mean_square + config.norm_eps) * w[f"{name}.weight"].astype(np.float64)

        def linear(x_BTD: np.ndarray, name: str) -> np.ndarray:
            return x_BTD @ w[f"{name}.weight"].astype(np.float64).T

        x_BTD = w["model.embed_tokens.weight"][tokens_BT].astype(np.float64) * self.embedding_scale
        yield "model.embed_tokens", x_BTD
        for i in range(config.n_layers):
            block = f"model.layers.{i}"
            h_BTD = norm(x_BTD, f"{block}.input_layernorm")
            yield f"{block}.input_layernorm", h_BTD
            q_BTNH, k_BTKH, v_BTKH = (
                linear(h_BTD, f"{block}.self_attn.{part}_proj").reshape(B, T, -1, H) for part in "qkv"
            )
            q_BTNH, k_BTKH = self.rotation(q_BTNH, *turn), self.rotation(k_BTKH, *turn)
            for part, x_BTxH in zip("qkv", (q_BTNH, k_BTKH, v_BTKH), strict=True):
                yield f"{block}.self_attn.{part}", x_BTxH.reshape(B, T, -1)
            if self.tiled_groups:
                q_BKGTH = q_BTNH.reshape(B, T, -1, K, H).transpose(0, 3, 2, 1, 4)
            else:
                q_BKGTH = q_BTNH.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4)
            k_BK1HS, v_BK1SH = k_BTKH.transpose(0, 2, 3, 1)[:, :, None], v_BTKH.transpose(0, 2, 1, 3)[:, :, None]
            scores_BKGTS = np.where(visible_TS, q_BKGTH @ k_BK1HS * scale, -np.inf)
            weights_BKGTS = np.exp(scores_BKGTS - scores_BKGTS.max(axis=-1, keepdims=True))
            weights_BKGTS /= weights_BKGTS.sum(axis=-1, keepdims=True)
            heads = (0, 3, 2, 1, 4) if self.tiled_groups else (0, 3, 1, 2, 4)
            out_BTD = (weights_BKGTS @ v_BK1SH).transpose(heads).reshape(B, T, -1)
            attended_BTD = linear(out_BTD, f"{block}.self_attn.o_proj")
            yield f"{block}.self_attn", attended_BTD
            x_BTD = x_BTD + attended_BTD
            h_BTD = norm(x_BTD, f"{block}.post_attention_layernorm")
            yield f"{block}.post_attention_layernorm", h_BTD
            gate_BTF, up_BTF = (linear(h_BTD, f"{block}.mlp.{part}_proj") for part in ("gate", "up"))
            out_BTD = linear(self.activation(gate_BTF) * up_BTF, f"{block}.mlp.down_proj")
            yield f"{block}.mlp", out_BTD
            x_BTD = x_BTD + out_BTD
            yield block, x_BTD
        x_BTD = norm(x_BTD, "model.norm") if self.final_norm else x_BTD
        yield "model.norm", x_BTD
        yield "logits", linear(x_BTD, "model.embed_tokens" if config.tie_embeddings else "lm_head")
