"""Attention: the mask and its lowering, a plain implementation, a fused kernel, and the module that uses them.

Shapes: B batch, T query time, S key time, D width, N query heads, K key/value heads, H head dim. The softmax runs in at
least float32.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm_core.config import ModelConfig, RunConfig
from minillm_core.errors import InputError
from minillm_core.model.mask import AttentionMask, effective_window, kernel_limit
from minillm_torch.device import default_device
from minillm_torch.kv_cache import LayerCache, Slots, append
from minillm_torch.layers import Linear, apply_rope
from minillm_torch.precision import resolve_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PositionContext:
    """What the positions of a call's tokens determine: RoPE factors, mask and cache slots. All layers share it."""

    cos_BT1H: Tensor
    sin_BT1H: Tensor
    mask: AttentionMask
    bias_BTS: Tensor | None
    """The mask for the plain implementation; None if the fused kernel computes it (see `lower`)."""
    slots: Slots | None
    """Where the new keys and values go in the cache; None without a cache."""


def lower(
    mask: AttentionMask, n_queries: int, n_keys: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """None if the fused kernel can compute this mask, else what the plain implementation adds to the scores."""
    limit, part = _kernel_limit(n_queries, head_dim, dtype, device), _inexpressible(mask)
    if limit is None and part is None:
        return None
    is_compiling = torch.compiler.is_compiling()  # a compiler cannot write to the log; `describe_attention` does
    if limit is None and mask.query_index_BT is None and not is_compiling:  # with a cache, attention is always plain
        _say_plain(part)
    return mask_bias(mask, n_queries, n_keys, dtype, device)


def mask_bias(mask: AttentionMask, n_queries: int, n_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The term added to the scores, (B, T, S) or (1, T, S): 0 for the keys that a query sees, else -inf."""
    query_T, key_S = torch.arange(n_queries, device=device), torch.arange(n_keys, device=device)
    query_BT1 = (query_T[None] if mask.query_index_BT is None else mask.query_index_BT)[:, :, None]
    hidden_BTS = key_S > query_BT1
    if mask.window is not None:
        hidden_BTS = hidden_BTS | (key_S <= query_BT1 - mask.window)
    if mask.query_segments_BT is not None and mask.key_segments_BS is not None:
        hidden_BTS = hidden_BTS | (mask.query_segments_BT[:, :, None] != mask.key_segments_BS[:, None])
    return torch.zeros(hidden_BTS.shape, dtype=dtype, device=device).masked_fill(hidden_BTS, -torch.inf)


@lru_cache
def _say_plain(part: str | None) -> None:
    """Says once for each part why attention is not fused."""
    logger.info(f"plain attention, which is slower and needs more memory: the fused kernel cannot compute {part}")


def attend(q_BTNH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias_BTS: Tensor) -> Tensor:
    """Grouped-query attention: softmax(q k^T / sqrt(H) + bias) v; (B, T, N, H)."""
    enable_gqa = q_BTNH.shape[2] != k_BKSH.shape[1]
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2), k_BKSH, v_BKSH, attn_mask=bias_BTS[:, None], enable_gqa=enable_gqa
    )
    return out_BNTH.transpose(1, 2)


def attend_fused(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, mask: AttentionMask) -> Tensor:
    """The same as `attend`, as one flash or cuDNN kernel that never stores the scores.

    Raises:
        InputError: the kernel cannot express the mask.
    """
    if (part := _inexpressible(mask)) is not None:
        raise InputError("the fused attention kernel cannot compute this mask", found=part, expected="a causal mask")
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _inexpressible(mask: AttentionMask) -> str | None:
    """The part of a mask that the fused kernel cannot express."""
    if mask.query_segments_BT is not None:
        return "segments (documents that share a row)"
    if mask.window is not None:
        return "a sliding window"
    return None if mask.query_index_BT is None else "queries that continue a cache"


def why_not_fused(
    mask: AttentionMask, n_queries: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why the fused kernel cannot compute this attention; None if it can."""
    return _kernel_limit(n_queries, head_dim, dtype, device) or _inexpressible(mask)


def _kernel_limit(n_queries: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these inputs are not fused, whatever the mask: see core's `kernel_limit`.

    On a CPU, PyTorch takes the same flash kernel for a mask that is described and for one that is given as numbers, and
    the results have the same bits. Only the former skips keys that no query of a block sees.
    """
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    capability = major + minor / 10 if device.type == "cuda" else None
    return kernel_limit(capability, str(dtype).removeprefix("torch."), head_dim, n_queries)


def describe_attention(config: RunConfig) -> str:
    """The attention that a run uses, for the log."""
    model, dtype = config.model, resolve_dtype(config.train.compute_dtype)
    T = config.train.seq_len
    segments = torch.zeros((1, 1), dtype=torch.int32) if config.data.document_mask else None
    mask = AttentionMask(effective_window(model.sliding_window, T), None, segments, segments)
    why = why_not_fused(mask, T, model.resolved_head_dim, dtype, default_device())
    return "fused attention (SDPA)" if why is None else f"plain attention: {why}"


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
            assert positions.bias_BTS is not None  # the fused kernel takes no cache
            cache = append(cache, k_BTKH, v_BTKH, positions.slots)
            out_BTNH = attend(q_BTNH, cache.k_BKSH, cache.v_BKSH, positions.bias_BTS)
        elif positions.bias_BTS is None:
            out_BTNH = attend_fused(q_BTNH, k_BTKH, v_BTKH, positions.mask)
        else:
            k_BKTH, v_BKTH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
            out_BTNH = attend(q_BTNH, k_BKTH, v_BKTH, positions.bias_BTS)
        return self.o_proj(out_BTNH.reshape(B, T, -1)), cache
