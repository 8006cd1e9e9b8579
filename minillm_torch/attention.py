"""Attention: the causal mask, a plain implementation, a fused kernel, and the module that chooses between the two.

Shapes: B batch, T query time, S key time, D width, N query heads, K key/value heads, H head dim. The softmax runs in at
least float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm_core.config import ModelConfig
from minillm_torch.kv_cache import LayerCache, Slots, append
from minillm_torch.layers import Linear, apply_rope


@dataclass(frozen=True)
class PositionContext:
    """What the positions of a call's tokens determine: RoPE factors, mask and cache slots. All layers share it."""

    cos_BT1H: Tensor
    sin_BT1H: Tensor
    mask_BTS: Tensor
    slots: Slots | None
    """Where the new keys and values go in the cache; None without a cache."""


def causal_mask(position_BT: Tensor, n_keys: int, dtype: torch.dtype) -> Tensor:
    """The term added to the scores (B, T, S): 0 for the keys that a query at position p sees (0 to p), else -inf."""
    later_BTS = torch.arange(n_keys, device=position_BT.device) > position_BT[:, :, None]
    return torch.zeros(later_BTS.shape, dtype=dtype, device=position_BT.device).masked_fill(later_BTS, -torch.inf)


def attend(q_BTNH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_BTS: Tensor) -> Tensor:
    """Grouped-query attention: softmax(q k^T / sqrt(H) + mask) v; (B, T, N, H)."""
    enable_gqa = q_BTNH.shape[2] != k_BKSH.shape[1]
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2), k_BKSH, v_BKSH, attn_mask=mask_BTS[:, None], enable_gqa=enable_gqa
    )
    return out_BNTH.transpose(1, 2)


def attend_fused(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """`attend` with queries and keys at positions 0 to T - 1, as one flash or cuDNN kernel that never stores scores."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def can_fuse(q_BTNH: Tensor) -> bool:
    """Whether the fused kernel can run: it needs an Ampere or later GPU, 16-bit inputs, an even T, and a head_dim that
    is a multiple of 8 and at most 128."""
    _, T, _, H = q_BTNH.shape
    fits = q_BTNH.dtype.itemsize == 2 and H % 8 == 0 and H <= 128 and T % 2 == 0
    return fits and q_BTNH.is_cuda and torch.cuda.get_device_capability(q_BTNH.device) >= (8, 0)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; K key/value heads serve N query heads in groups."""

    def __init__(self, config: ModelConfig, *, param_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        self.head_dim = config.resolved_head_dim
        D, Q, KV = config.width, config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.q_proj = Linear(D, Q, **dtypes)
        self.k_proj = Linear(D, KV, **dtypes)
        self.v_proj = Linear(D, KV, **dtypes)
        self.o_proj = Linear(Q, D, **dtypes)

    def qkv(self, x_BTD: Tensor, positions: PositionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated by their positions (RoPE), and values: (B, T, N or K, H)."""
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = (
            proj(x_BTD).reshape(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        qk_BTxH = torch.cat([q_BTNH, k_BTKH], dim=2)  # x: all heads that are rotated
        qk_BTxH = apply_rope(qk_BTxH, positions.cos_BT1H, positions.sin_BT1H)
        q_BTNH, k_BTKH = qk_BTxH.split([q_BTNH.shape[2], k_BTKH.shape[2]], dim=2)
        return q_BTNH, k_BTKH, v_BTKH

    def forward(
        self, x_BTD: Tensor, positions: PositionContext, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = self.qkv(x_BTD, positions)
        if cache is not None:
            assert positions.slots is not None  # set whenever there is a cache
            cache = append(cache, k_BTKH, v_BTKH, positions.slots)
            out_BTNH = attend(q_BTNH, cache.k_BKSH, cache.v_BKSH, positions.mask_BTS)
        elif can_fuse(q_BTNH):
            out_BTNH = attend_fused(q_BTNH, k_BTKH, v_BTKH)
        else:
            out_BTNH = attend(q_BTNH, k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2), positions.mask_BTS)
        return self.o_proj(out_BTNH.reshape(B, T, -1)), cache
