"""The parts of the model other than attention: linear layer, embedding, norm, rotary rotation (RoPE), MLP.

Shapes: B batch, T time, D width, F hidden, N heads, H head dim, V vocabulary. Parameters keep their own dtype; matrix
products run in `compute_dtype`; norms and rotations run in at least float32.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from minillm_core.config import ModelConfig
from minillm_torch.precision import at_least_float32, cast

FEW_ROWS, SLICES = 64, 8
ROWS_PER_COPY = 256
"""That `_transposed` copies at a time, so that the lines of memory that they share stay in the cache."""
VECTORS, PART = 64, 32768
"""Of torch's loops over numbers on a CPU: the most that one step takes, and the least that threads share."""


def _processor() -> str:
    """The maker of the CPU as Linux names it, or an empty string."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return next((maker for maker in ("AuthenticAMD", "GenuineIntel") if maker in text), "")


def _mkl_is_slow() -> bool:
    """Whether products in float32 of many rows avoid MKL: on AMD processors with AVX-512, which MKL does not use there.

    A rule and not a measurement, so that the same machine takes the same path in every process: a resumed run must
    repeat every bit. Measured on two cores of an AMD EPYC: MKL computes 214 GFLOP/s, oneDNN 500. On two cores of an
    Intel Xeon, MKL is as fast as oneDNN or faster.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return _processor() == "AuthenticAMD" and has_avx512 and torch.backends.mkldnn.is_available()


MKL_IS_SLOW = _mkl_is_slow()
FEWEST_SLICED = 2 if _processor() == "GenuineIntel" else 1
"""The smallest number of rows for which `matmul` cuts the weight into slices."""


def _transposed(x_RC: Tensor) -> Tensor:
    """A contiguous copy (C, R) of a matrix, in parts because torch transposes a whole matrix in a single thread."""
    return torch.cat([part_PC.mT for part_PC in x_RC.split(ROWS_PER_COPY)], dim=1)


class _OneDNNProduct(torch.autograd.Function):
    """x_RI @ w_OI.T and its gradients by oneDNN, exact in float32 (R rows, I inputs, O outputs)."""

    @staticmethod
    def forward(x_RI: Tensor, w_OI: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_RI, w_OI, None, "none", [], "")

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_RI, w_OI = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad
        grad_RI = _OneDNNProduct.apply(grad_RO, w_OI.mT) if needs_x else None
        return grad_RI, weight_gradient(grad_RO, x_RI) if needs_w else None


def _takes_onednn(x: Tensor, n_rows: int) -> bool:
    is_eager_on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_eager_on_cpu and x.dtype == torch.float32 and n_rows > FEW_ROWS and MKL_IS_SLOW


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T over the last axis of x; w has shape (out, in).

    On a CPU, up to FEW_ROWS rows are multiplied with SLICES slices of the weight as one batch of products, because MKL
    runs one product of few rows on one core. Measured in float32 on two cores: 16 rows take 0.75 of the time on an AMD
    EPYC and 0.5 on an Intel Xeon. A single row is different on Intel, where MKL uses all cores for it: the Xeon reads
    weights at 19 GB/s as a whole and at 9 GB/s in slices, the EPYC at 9 and 21. More rows: see `_mkl_is_slow`.
    """
    x_1RI = x if x.ndim == 3 and len(x) == 1 else x.reshape(1, -1, x.shape[-1])
    if _takes_onednn(x, x_1RI.shape[1]):
        return _OneDNNProduct.apply(x_1RI[0], w).reshape(*x.shape[:-1], len(w))
    is_sliced = FEWEST_SLICED <= x_1RI.shape[1] <= FEW_ROWS and len(w) % SLICES == 0
    if x.is_cuda or x.dtype.itemsize == 2 or not is_sliced:
        return F.linear(x, w)
    out_SxR = torch.bmm(w.view(SLICES, -1, w.shape[1]), x_1RI.mT.expand(SLICES, -1, -1))  # x: outputs of a slice
    return out_SxR.permute(2, 0, 1).reshape(*x.shape[:-1], len(w))


def weight_gradient(grad_RO: Tensor, x_RI: Tensor) -> Tensor:
    """The gradient (O, I) of w_OI in `matmul(x_RI, w_OI)`, from that of the product.

    oneDNN reads a transposed second matrix as it is and needs a copy of a transposed first one, so the product is
    computed in the order that copies fewer numbers.
    """
    if not _takes_onednn(grad_RO, len(grad_RO)):
        return grad_RO.mT @ x_RI
    product, n_weights = _OneDNNProduct.apply, grad_RO.shape[1] * x_RI.shape[1]
    if x_RI.numel() + n_weights < grad_RO.numel():
        return _transposed(product(_transposed(x_RI), grad_RO.mT))
    return product(_transposed(grad_RO), x_RI.mT)


class Linear(nn.Module):
    """x @ W.T without bias; W has shape (out, in)."""

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
    """The factors (B, T, 1, H) for `apply_rope`, from the cosines and sines of the H/2 angles at each position."""
    cos_BTH, sin_BTH = torch.cat([cos_BTh, cos_BTh], dim=-1), torch.cat([-sin_BTh, sin_BTh], dim=-1)
    return cos_BTH[:, :, None], sin_BTH[:, :, None]


def apply_rope(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Rotates channels i and i + H/2 together by the angle of the position; cos and sin come from `rotation`."""
    x = cast(x_BTNH, cos_BT1H.dtype)
    first, second = x.chunk(2, dim=-1)
    return cast(x * cos_BT1H + torch.cat([second, first], dim=-1) * sin_BT1H, x_BTNH.dtype)


def silu(x_BTF: Tensor) -> Tensor:
    """x * sigmoid(x). When text is decoded, the numbers of a row do not depend on its place in the batch.

    On a CPU, torch computes up to VECTORS numbers at the end of a tensor, and at the end of every thread's part of a
    tensor of PART numbers or more, with a scalar exp, which rounds differently. Then each row is computed on its own.
    """
    is_decoding = x_BTF.shape[1] == 1 < len(x_BTF) and not torch.is_grad_enabled()
    is_eager_on_cpu = x_BTF.device.type == "cpu" and not torch.compiler.is_compiling()
    has_ends = x_BTF.shape[-1] % VECTORS or x_BTF.numel() >= PART
    if not (is_decoding and is_eager_on_cpu and has_ends):
        return F.silu(x_BTF)
    out_BTF = torch.empty_like(x_BTF)
    for x_TF, out_TF in zip(x_BTF, out_BTF, strict=True):
        torch.ops.aten.silu.out(x_TF, out=out_TF)
    return out_BTF


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, param_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.gate_proj = Linear(config.width, config.hidden, **dtypes)
        self.up_proj = Linear(config.width, config.hidden, **dtypes)
        self.down_proj = Linear(config.hidden, config.width, **dtypes)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
