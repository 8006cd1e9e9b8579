"""The reference: a third implementation of the model, in numpy and float64, that uses neither framework.

It computes stage by stage, and only as far as requested. Its parts can be replaced by faulty ones (doctor/faults.py),
which shows which of two different models is wrong, and how.

Shapes: B batch, T query time, S key time, D width, N query heads, K key/value heads, G = N / K, H head dim.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.model.rope import inverse_frequencies
from minillm_core.model.stages import Trace, stage_names


def silu(x: np.ndarray) -> np.ndarray:
    return x * np.exp(-np.logaddexp(0, -x))


def half_split_rotation(x_BTNH: np.ndarray, cos_T1H: np.ndarray, sin_T1H: np.ndarray) -> np.ndarray:
    """Rotates channel i together with channel i + H/2."""
    first, second = np.split(x_BTNH, 2, axis=-1)
    return np.concatenate([first * cos_T1H - second * sin_T1H, second * cos_T1H + first * sin_T1H], axis=-1)


def token_losses(logits_BTV: np.ndarray, tokens_BT: np.ndarray) -> np.ndarray:
    """The loss of every token except the first, in nats (B, T - 1)."""
    logits_BTV = logits_BTV[:, :-1]
    chosen_BT = np.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return np.logaddexp.reduce(logits_BTV, axis=-1) - chosen_BT


@dataclass(frozen=True)
class Reference:
    """A model: its configuration, its weights, and the choices of an implementation (the defaults are correct)."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    frequencies: Callable[[ModelConfig], np.ndarray] = inverse_frequencies
    """Radians per position of each channel pair, (H/2,)."""
    rotation: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] = half_split_rotation
    activation: Callable[[np.ndarray], np.ndarray] = silu
    attention_scale: float | None = None
    """None: 1 / sqrt(H)."""
    tiled_groups: bool = False
    """Query head n reads KV head n % K instead of n // G."""
    sees_future: bool = False
    embedding_scale: float = 1.0
    final_norm: bool = True

    def stages(self, tokens_BT: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Name and value of every stage, in the order of `stage_names`. Each stage is computed when it is requested."""
        computed: dict[str, np.ndarray] = {}
        for name in stage_names(self.config):
            computed[name] = self.stage(name, computed, tokens_BT)
            yield name, computed[name]

    def trace(self, tokens_BT: np.ndarray) -> Trace:
        """What the model computes for tokens (B, T), without gradients."""
        stages = dict(self.stages(tokens_BT))
        return Trace(stages, token_losses(stages["logits"], tokens_BT), {})

    def stage(self, name: str, before: Mapping[str, np.ndarray], tokens_BT: np.ndarray) -> np.ndarray:
        """One stage, float64 (B, T, width of the stage), computed from the previous stages.

        `before` holds these previous stages; they may come from a different model.
        """
        if name == "model.embed_tokens":
            return self._weight(name)[tokens_BT] * self.embedding_scale
        last = f"model.layers.{self.config.n_layers - 1}"
        if name == "model.norm":
            return self._norm(before[last], name) if self.final_norm else before[last]
        if name == "logits":
            return self._linear(before["model.norm"], "model.embed_tokens" if self.config.tie_embeddings else "lm_head")
        _, _, number, *rest = name.split(".")
        block, part = f"model.layers.{number}", ".".join(rest)
        x_BTD = before[f"model.layers.{int(number) - 1}" if int(number) else "model.embed_tokens"]
        if part == "input_layernorm":
            return self._norm(x_BTD, name)
        if part in ("self_attn.q", "self_attn.k", "self_attn.v"):
            return self._projected(before[f"{block}.input_layernorm"], name)
        if part == "self_attn":
            return self._linear(self._attended(*(before[f"{name}.{letter}"] for letter in "qkv")), f"{name}.o_proj")
        x_BTD = x_BTD + before[f"{block}.self_attn"]
        if part == "post_attention_layernorm":
            return self._norm(x_BTD, name)
        if part == "mlp":
            h_BTD = before[f"{block}.post_attention_layernorm"]
            gate_BTF, up_BTF = (self._linear(h_BTD, f"{name}.{proj}_proj") for proj in ("gate", "up"))
            return self._linear(self.activation(gate_BTF) * up_BTF, f"{name}.down_proj")
        return x_BTD + before[f"{block}.mlp"]

    def _weight(self, name: str) -> np.ndarray:
        return self.weights[f"{name}.weight"].astype(np.float64)

    def _norm(self, x_BTD: np.ndarray, name: str) -> np.ndarray:
        mean_square = np.mean(x_BTD * x_BTD, axis=-1, keepdims=True)
        return x_BTD / np.sqrt(mean_square + self.config.norm_eps) * self._weight(name)

    def _linear(self, x_BTD: np.ndarray, name: str) -> np.ndarray:
        return x_BTD @ self._weight(name).T

    def _projected(self, x_BTD: np.ndarray, name: str) -> np.ndarray:
        """Queries, keys or values. Queries and keys are rotated by their positions."""
        B, T, _ = x_BTD.shape
        heads_BTxH = self._linear(x_BTD, f"{name}_proj").reshape(B, T, -1, self.config.resolved_head_dim)
        if not name.endswith(".v"):
            angles_T1H = np.arange(T, dtype=np.float64)[:, None, None] * self.frequencies(self.config)
            heads_BTxH = self.rotation(heads_BTxH, np.cos(angles_T1H), np.sin(angles_T1H))
        return heads_BTxH.reshape(B, T, -1)

    def _attended(self, q_BTx: np.ndarray, k_BTx: np.ndarray, v_BTx: np.ndarray) -> np.ndarray:
        """The outputs of all heads, concatenated (B, T, N x H)."""
        B, T, _ = q_BTx.shape
        K, H = self.config.n_kv_heads, self.config.resolved_head_dim
        if self.tiled_groups:
            q_BKGTH = q_BTx.reshape(B, T, -1, K, H).transpose(0, 3, 2, 1, 4)
        else:
            q_BKGTH = q_BTx.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4)
        k_BK1HS = k_BTx.reshape(B, T, K, H).transpose(0, 2, 3, 1)[:, :, None]
        v_BK1SH = v_BTx.reshape(B, T, K, H).transpose(0, 2, 1, 3)[:, :, None]
        scale = H**-0.5 if self.attention_scale is None else self.attention_scale
        visible_TS = np.tri(T, dtype=bool) | self.sees_future
        if (window := self.config.sliding_window) is not None:
            visible_TS &= ~np.tri(T, k=-window, dtype=bool)
        scores_BKGTS = np.where(visible_TS, q_BKGTH @ k_BK1HS * scale, -np.inf)
        weights_BKGTS = np.exp(scores_BKGTS - scores_BKGTS.max(axis=-1, keepdims=True))
        weights_BKGTS /= weights_BKGTS.sum(axis=-1, keepdims=True)
        order = (0, 3, 2, 1, 4) if self.tiled_groups else (0, 3, 1, 2, 4)
        return (weights_BKGTS @ v_BK1SH).transpose(order).reshape(B, T, -1)
