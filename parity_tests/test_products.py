"""PyTorch's float32 products by oneDNN, which are used on AMD processors with AVX-512, on any processor."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from minillm_torch import layers
from minillm_torch.loss import mean_loss
from minillm_torch.model import MiniLLM
from parity_tests.conftest import MODELS, make_pair, random_tokens, torch_batch
from parity_tests.conftest import TIERS as PRECISIONS

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")

SHAPES = [(300, 96, 96), (300, 96, 509), (300, 160, 96), (1025, 24, 40), (65, 8, 512)]
"""Rows, inputs, outputs: gradients of weights in both orders, and copies that end with a smaller part."""


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products as on an AMD processor; the rows of each product that oneDNN computes."""
    rows: list[int] = []
    apply = layers._OneDNNProduct.apply

    def counted(x_RI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
        rows.append(len(x_RI))
        return apply(x_RI, w_OI)

    monkeypatch.setattr(layers, "MKL_IS_SLOW", True)
    monkeypatch.setattr(layers._OneDNNProduct, "apply", counted)
    return rows


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize(("rows", "d_in", "d_out"), SHAPES)
def test_product_and_gradients(rows: int, d_in: int, d_out: int, onednn: list[int]) -> None:
    """As exact as float32 allows, also the gradients of the gradients. Measured: at most 4e-7."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*shape, generator=generator) for shape in ((2, rows, d_in), (d_out, d_in), (2, rows, d_out)))
    results = {}
    for product, dtype in ((layers.matmul, torch.float32), (F.linear, torch.float64)):
        x_BTI, w_OI = (tensor.to(dtype).requires_grad_() for tensor in (x, w))
        out_BTO = product(x_BTI, w_OI)
        first = torch.autograd.grad((out_BTO * g).square().sum(), (x_BTI, w_OI), create_graph=True)
        second = torch.autograd.grad(sum(tensor.square().sum() for tensor in first), (x_BTI, w_OI))
        results[dtype] = [out_BTO, *first, *second]
        assert all(tensor.is_contiguous() for tensor in first)
    assert len(onednn) > 3, "not computed by oneDNN"
    for ours, exact in zip(results[torch.float32], results[torch.float64], strict=True):
        assert relative(ours.detach(), exact.detach()) <= 2e-6


@pytest.mark.parametrize("fewest", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 64, 65])
def test_few_rows(rows: int, fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths to a product of few rows, whatever the processor is."""
    calls: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *factors: calls.append(1) or bmm(*factors))
    monkeypatch.setattr(layers, "FEWEST_SLICED", fewest)
    generator = torch.Generator().manual_seed(0)
    for d_out in (40, 41):  # 8 slices divide only the first
        x_BTI, w_OI = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((rows, 1, 96), (d_out, 96)))
        exact_BTO = torch.einsum("bti,oi->bto", x_BTI, w_OI)
        calls.clear()
        assert relative(layers.matmul(x_BTI, w_OI), exact_BTO) <= 1e-14
        assert relative(layers.matmul(x_BTI.float(), w_OI.float()).double(), exact_BTO) <= 1e-6
        assert len(calls) == (2 if fewest <= rows <= 64 and d_out == 40 else 0)


def test_model_and_its_gradients(onednn: list[int]) -> None:
    """A whole model, with and without oneDNN."""
    pair = make_pair(MODELS["gqa"], PRECISIONS["float32"])
    batch = torch_batch(random_tokens(pair.config, 2, 101))

    def gradients() -> dict[str, torch.Tensor]:
        pair.torch.zero_grad()
        mean_loss(pair.torch, batch).backward()
        return {name: param.grad.clone() for name, param in pair.torch.named_parameters()}

    with_onednn = gradients()
    n_products = len(onednn)
    assert n_products == 3 * (7 * pair.config.n_layers + 1), "forward, gradients of inputs and weights, the head's too"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "MKL_IS_SLOW", False)
        without = gradients()
    assert len(onednn) == n_products
    for name, exact in without.items():
        assert relative(with_onednn[name], exact) <= PRECISIONS["float32"].gradient, name


@pytest.mark.parametrize(
    ("rows", "dtype", "compiled", "is_used"),
    [
        (65, torch.float32, False, True),
        (64, torch.float32, False, False),  # decoding: slices of the weight
        (65, torch.float64, False, False),  # oneDNN has no float64
        (65, torch.bfloat16, False, False),  # PyTorch uses oneDNN by itself
        (65, torch.float32, True, False),  # Inductor cannot compile the call for weights that change
    ],
)
def test_which_products_onednn_computes(
    rows: int, dtype: torch.dtype, compiled: bool, is_used: bool, onednn: list[int]
) -> None:
    product = torch.compile(layers.matmul, backend="eager", fullgraph=True) if compiled else layers.matmul
    product(torch.ones(1, rows, 16, dtype=dtype), torch.ones(8, 16, dtype=dtype))
    assert onednn == [rows] * is_used


def test_abstract_model_counts_its_products(onednn: list[int]) -> None:
    """A model without memory, whose operations are counted, takes PyTorch's own product."""
    with torch.device("meta"):
        model = MiniLLM(MODELS["gqa"], param_dtype=torch.float32, compute_dtype=torch.float32)
        model(torch.zeros((2, 100), dtype=torch.int64))
    assert onednn == []


@pytest.mark.parametrize(
    ("vendor", "capability", "is_faster"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_where_onednn_is_used(
    vendor: str, capability: str, is_faster: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It depends on the processor alone, so that a resumed run takes the same path."""
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(layers, "Path", lambda _: info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert layers._mkl_is_slow() == is_faster
    info.unlink()
    assert not layers._mkl_is_slow()
