"""The model's parts.

Shapes: B batch, T query time, S key time, D width, F hidden, N query heads, K key/value heads, G = N / K, H head dim,
V vocabulary. Parameters keep their own dtype; matrix products run in `compute_dtype`; norms, rotations, softmax and
loss run in at least float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm_core.config import ModelConfig
from minillm_torch.kv_cache import LayerCache, Slots, append


@dataclass(frozen=True)
class Places:
    """Where the tokens of a call are, the same for every layer."""

    cos_BT1H: Tensor
    sin_BT1H: Tensor
    mask_BTS: Tensor
    slots: Slots | None
    """Where the cache keeps them."""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for float32 and smaller, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes 0.7 us even where it does nothing, in a decoding step some 350 times."""
    return x if x.dtype == dtype else x.to(dtype)


FEW_ROWS, SLICES = 64, 8


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T over the last axis of x, w (out, in).

    On a CPU, few rows go through a batch of products with slices of the weight: MKL runs a single one on one core (on
    two cores of an AMD EPYC, float32, one row: 9 GB/s of weights read, 21 in 8 slices; 16 rows take 0.75 of the time).
    """
    x_1RI = x if x.ndim == 3 and len(x) == 1 else x.reshape(1, -1, x.shape[-1])
    if x.is_cuda or x.dtype.itemsize == 2 or x_1RI.shape[1] > FEW_ROWS or len(w) % SLICES:
        return F.linear(x, w)
    out_SxR = torch.bmm(w.view(SLICES, -1, w.shape[1]), x_1RI.mT.expand(SLICES, -1, -1))  # x: outputs of a slice
    return out_SxR.permute(2, 0, 1).reshape(*x.shape[:-1], len(w))


class Linear(nn.Module):
    """x @ W.T without bias, W (out, in)."""

    def __init__(self, d_in: int, d_out: int, *, param_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(torch.zeros(d_out, d_in, dtype=param_dtype))

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype
        return matmul(cast(x, dtype), cast(self.weight, dtype))


class Embedding(nn.Module):
    """Token embedding (V, D), which a tied model also uses as its output head."""

    def __init__(self, vocab_size: int, width: int, *, param_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(torch.zeros(vocab_size, width, dtype=param_dtype))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight).to(self.compute_dtype)

    def attend(self, x_BTD: Tensor) -> Tensor:
        """Logits (B, T, V): the product of every position with every token's embedding."""
        dtype = self.compute_dtype
        return matmul(cast(x_BTD, dtype), cast(self.weight, dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, *, eps: float, param_dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=param_dtype))

    def forward(self, x_BTD: Tensor) -> Tensor:
        high = at_least_float32(x_BTD.dtype)
        x = F.rms_norm(cast(x_BTD, high), self.weight.shape, cast(self.weight, high), self.eps)
        return cast(x, x_BTD.dtype)


def rotation(cos_BTh: Tensor, sin_BTh: Tensor) -> tuple[Tensor, Tensor]:
    """What `apply_rope` takes, of the cosines and sines of the H/2 angles at each position: (B, T, 1, H)."""
    return torch.cat([cos_BTh, cos_BTh], dim=-1)[:, :, None], torch.cat([-sin_BTh, sin_BTh], dim=-1)[:, :, None]


def apply_rope(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Turns channel i together with channel i + H/2 by the angle of the position; cos and sin are of `rotation`."""
    x = cast(x_BTNH, cos_BT1H.dtype)
    first, second = x.chunk(2, dim=-1)
    return cast(x * cos_BT1H + torch.cat([second, first], dim=-1) * sin_BT1H, x_BTNH.dtype)


def causal_mask(position_BT: Tensor, n_keys: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores (B, T, S): -inf, but 0 where the query at position p sees the keys at 0 to p."""
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
    """`attend` over the same positions, 0 to T - 1, as one flash or cuDNN kernel that never stores the scores."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def can_fuse(q_BTNH: Tensor) -> bool:
    """Whether the fused kernel's conditions hold: an Ampere or later GPU, 16-bit inputs, head_dim a multiple of 8 up to
    128, even T."""
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

    def qkv(self, x_BTD: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by their positions, and values: (B, T, N or K, H)."""
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = (
            proj(x_BTD).reshape(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        qk_BTxH = torch.cat([q_BTNH, k_BTKH], dim=2)  # x: all heads that turn
        qk_BTxH = apply_rope(qk_BTxH, places.cos_BT1H, places.sin_BT1H)
        q_BTNH, k_BTKH = qk_BTxH.split([q_BTNH.shape[2], k_BTKH.shape[2]], dim=2)
        return q_BTNH, k_BTKH, v_BTKH

    def forward(self, x_BTD: Tensor, places: Places, cache: LayerCache | None) -> tuple[Tensor, LayerCache | None]:
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = self.qkv(x_BTD, places)
        if cache is not None:
            assert places.slots is not None  # made where there is a cache
            cache = append(cache, k_BTKH, v_BTKH, places.slots)
            out_BTNH = attend(q_BTNH, cache.k_BKSH, cache.v_BKSH, places.mask_BTS)
        elif can_fuse(q_BTNH):
            out_BTNH = attend_fused(q_BTNH, k_BTKH, v_BTKH)
        else:
            out_BTNH = attend(q_BTNH, k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2), places.mask_BTS)
        return self.o_proj(out_BTNH.reshape(B, T, -1)), cache


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, param_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.gate_proj = Linear(config.width, config.hidden, **dtypes)
        self.up_proj = Linear(config.width, config.hidden, **dtypes)
        self.down_proj = Linear(config.hidden, config.width, **dtypes)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, param_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.input_layernorm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, **dtypes)
        self.post_attention_layernorm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.mlp = MLP(config, **dtypes)

    def forward(self, x_BTD: Tensor, places: Places, cache: LayerCache | None) -> tuple[Tensor, LayerCache | None]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), places, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache
