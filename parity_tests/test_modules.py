"""Every submodule, compared by name: the same inputs give the same outputs in both frameworks."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minillm_core.model.mask import AttentionMask
from minillm_core.model.rope import rope_table
from minillm_jax import attention as jax_attention
from minillm_jax import layers as jax_layers
from minillm_jax.device import compiling_for
from minillm_torch import attention as torch_attention
from minillm_torch import layers as torch_layers
from parity_tests.conftest import (
    TINY,
    Pair,
    assert_close,
    assert_close_norm,
    random_tokens,
    run_config,
    to_numpy,
    to_torch,
)

LENGTH = 300


def agree(pair: Pair, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compare float64 and float32 by the largest error, bfloat16 by the relative norm of the difference, since the
    largest of many rounding errors says little. Measured: at most 4.7e-3, in the MLP, where XLA may skip a rounding."""
    compare = assert_close_norm if pair.tier.name == "bfloat16" else assert_close
    compare(name, ours, theirs, pair.tier.module)


def both(pair: Pair, *shape: int, seed: int = 0) -> tuple[jax.Array, torch.Tensor]:
    array = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(array, pair.tier.jax), to_torch(array, pair.tier.torch)


CAUSAL = AttentionMask(window=None)


def positions(module_pair: Pair) -> tuple[jax_attention.PositionContext, torch_attention.PositionContext]:
    table = [table[None, :LENGTH] for table in rope_table(module_pair.config)]
    high_jax = jax_layers.at_least_float32(module_pair.tier.jax)
    high_torch = torch_layers.at_least_float32(module_pair.tier.torch)
    H = module_pair.config.resolved_head_dim
    ours = jax_attention.PositionContext(
        *jax_layers.rotation(*(jnp.asarray(x, high_jax) for x in table)),
        CAUSAL,
        jax_attention.lower(CAUSAL, LENGTH, LENGTH, H, module_pair.tier.jax),
        None,
    )
    theirs = torch_attention.PositionContext(
        *torch_layers.rotation(*(to_torch(x, high_torch) for x in table)),
        CAUSAL,
        torch_attention.lower(CAUSAL, LENGTH, LENGTH, H, module_pair.tier.torch, torch.device("cpu")),
        None,
    )
    return ours, theirs


def test_embedding(module_pair: Pair) -> None:
    tokens = random_tokens(module_pair.config, 2, LENGTH)
    ours = module_pair.jax.model.embed_tokens(jnp.asarray(tokens))
    assert_close("embed_tokens", to_numpy(ours), to_numpy(module_pair.torch.model.embed_tokens(to_torch(tokens))), 0.0)


def test_every_pointwise_module_by_name(module_pair: Pair) -> None:
    """Every norm, projection and MLP of every layer, the final norm and the output head."""
    c = module_pair.config
    ours, theirs = module_pair.jax, module_pair.torch
    modules = [("model.norm", ours.model.norm, theirs.model.norm, c.width)]
    modules.append(("head", ours.head, theirs.head, c.width))
    for i, (block_jax, block_torch) in enumerate(zip(ours.model.layers, theirs.model.layers, strict=True)):
        widths = {
            "input_layernorm": c.width,
            "self_attn.q_proj": c.width,
            "self_attn.k_proj": c.width,
            "self_attn.v_proj": c.width,
            "self_attn.o_proj": c.n_heads * c.resolved_head_dim,
            "post_attention_layernorm": c.width,
            "mlp": c.width,
            "mlp.gate_proj": c.width,
            "mlp.up_proj": c.width,
            "mlp.down_proj": c.hidden,
        }
        for name, width in widths.items():
            pick = attrgetter(name)
            modules.append((f"layers.{i}.{name}", pick(block_jax), pick(block_torch), width))
    for name, module_jax, module_torch, width in modules:
        x_jax, x_torch = both(module_pair, 2, 50, width)
        agree(module_pair, name, to_numpy(module_jax(x_jax)), to_numpy(module_torch(x_torch)))


def test_rotary_tables_match_core(module_pair: Pair) -> None:
    """Both equal the table of `rope_table`, in at least float32 even in a bfloat16 model."""
    for table, ours, theirs in zip(
        rope_table(module_pair.config),
        (module_pair.jax.model.cos_SH[...], module_pair.jax.model.sin_SH[...]),
        (module_pair.torch.model.cos_SH, module_pair.torch.model.sin_SH),
        strict=True,
    ):
        assert ours.dtype.itemsize == theirs.dtype.itemsize == (8 if module_pair.tier.name == "float64" else 4)
        assert np.array_equal(to_numpy(ours), to_numpy(theirs))
        assert np.abs(to_numpy(ours) - table).max() <= 6e-8


def test_rope(module_pair: Pair) -> None:
    x_jax, x_torch = both(module_pair, 2, LENGTH, 3, module_pair.config.resolved_head_dim)
    where_jax, where_torch = positions(module_pair)
    ours = jax_layers.apply_rope(x_jax, where_jax.cos_BT1H, where_jax.sin_BT1H)
    theirs = torch_layers.apply_rope(x_torch, where_torch.cos_BT1H, where_torch.sin_BT1H)
    agree(module_pair, "apply_rope", to_numpy(ours), to_numpy(theirs))
    # The complex-number form of the same rotation, from the paper, in float64.
    half = module_pair.config.resolved_head_dim // 2
    x = to_numpy(x_torch)
    cos, sin = (table[:LENGTH, None] for table in rope_table(module_pair.config))
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    agree(module_pair, "apply_rope against complex numbers", to_numpy(ours), expected)


def test_attend(module_pair: Pair) -> None:
    """Compared with each other, and with plain float64 loops over heads and positions."""
    c = module_pair.config
    T, S, H = 5, 9, c.resolved_head_dim
    (q_j, q_t), (k_j, k_t), (v_j, v_t) = (
        both(module_pair, 2, n, heads, H, seed=i)
        for i, (n, heads) in enumerate([(T, c.n_heads), (S, c.n_kv_heads), (S, c.n_kv_heads)])
    )
    position = np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    k_j, v_j, k_t, v_t = k_j.swapaxes(1, 2), v_j.swapaxes(1, 2), k_t.transpose(1, 2), v_t.transpose(1, 2)
    bias_j = jax_attention.mask_bias(AttentionMask(None, jnp.asarray(position)), T, S, q_j.dtype)
    bias_t = torch_attention.mask_bias(AttentionMask(None, to_torch(position)), T, S, q_t.dtype, q_t.device)
    ours = to_numpy(jax_attention.attend(q_j, k_j, v_j, bias_j))
    theirs = to_numpy(torch_attention.attend(q_t, k_t, v_t, bias_t))
    agree(module_pair, "attend", ours, theirs)
    q, k, v = to_numpy(q_t), to_numpy(k_t), to_numpy(v_t)
    expected = np.zeros_like(q)
    for b, t, n in np.ndindex(2, T, c.n_heads):
        kv_head = n // (c.n_heads // c.n_kv_heads)
        seen = position[b, t] + 1
        scores = k[b, kv_head, :seen] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        expected[b, t, n] = weights / weights.sum() @ v[b, kv_head, :seen]
    agree(module_pair, "attend against loops", ours, expected)


@pytest.mark.parametrize("window", [None, 1, 10])
def test_fused_attention_equals_plain_attention(
    window: int | None, module_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused attention, used on GPUs, equals `attend`. JAX's cuDNN call runs here in XLA, with a float32 softmax."""
    c = module_pair.config
    heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)
    inputs = [both(module_pair, 2, 64, n, c.resolved_head_dim, seed=i) for i, n in enumerate(heads)]
    q, k, v = (theirs for _, theirs in inputs)
    mask = AttentionMask(window)
    bias = torch_attention.mask_bias(mask, 64, 64, q.dtype, q.device)
    plain = to_numpy(torch_attention.attend(q, k.transpose(1, 2), v.transpose(1, 2), bias))
    if window is None:  # torch's fused kernel takes no window: test_packing.py
        agree(module_pair, "torch", to_numpy(torch_attention.attend_fused(q, k, v, mask)), plain)

    def in_xla(*args: jax.Array, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        return attention(*args, implementation="xla", **options)

    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    fused = to_numpy(jax_attention.attend_fused(*(ours for ours, _ in inputs), mask))
    assert_close("jax", fused, plain, max(module_pair.tier.module, 1e-5))


IDS = np.zeros((2, 64), np.int32)
WHY_NOT_FUSED = [
    (CAUSAL, 64, 64, "bfloat16", 9.0, None, None),
    (CAUSAL, 64, 128, "bfloat16", 8.0, None, None),
    (CAUSAL, 63, 64, "bfloat16", 9.0, "the length 63 is odd", "the length 63 is odd"),
    (CAUSAL, 64, 12, "bfloat16", 9.0, "head_dim 12 is not", "head_dim 12 is not"),
    (CAUSAL, 64, 256, "bfloat16", 9.0, "head_dim 256 is not", "head_dim 256 is not"),
    (CAUSAL, 64, 64, "float32", 9.0, "the dtype is float32", "the dtype is float32"),
    (CAUSAL, 64, 64, "bfloat16", 7.5, "older than Ampere", "older than Ampere"),
    (CAUSAL, 64, 64, "bfloat16", None, "not a GPU", None),
    (CAUSAL, 63, 12, "float32", None, "not a GPU", None),
    (AttentionMask(7), 64, 64, "bfloat16", None, "not a GPU", "a sliding window"),
    (AttentionMask(7), 64, 64, "bfloat16", 9.0, None, "a sliding window"),
    (AttentionMask(None, None, IDS, IDS), 64, 64, "bfloat16", 9.0, "segments", "segments"),
    (AttentionMask(7), 63, 64, "bfloat16", 9.0, "the length 63 is odd", "the length 63 is odd"),
    (AttentionMask(None, IDS), 64, 64, "bfloat16", 9.0, "continue a cache", "continue a cache"),
    (AttentionMask(None, IDS, IDS, IDS), 64, 64, "bfloat16", 9.0, "segments", "segments"),
]


@pytest.mark.parametrize(("mask", "T", "H", "dtype", "capability", "in_jax", "in_torch"), WHY_NOT_FUSED)
def test_why_not_fused(
    mask: AttentionMask,
    T: int,
    H: int,
    dtype: str,
    capability: float | None,
    in_jax: str | None,
    in_torch: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether attention is fused is decided from the device, the inputs and the mask; `lower` follows the decision."""
    device = torch.device("cpu" if capability is None else "cuda")
    if capability is not None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(int(10 * capability), 10))
    monkeypatch.setattr(
        torch_attention, "mask_bias", lambda *_: "the mask"
    )  # cannot be made on a GPU that is not there
    with compiling_for(gpu_of(capability)):
        ours = jax_attention.why_not_fused(mask, T, H, jnp.dtype(dtype))
        with said_once(jax_attention, caplog, in_jax, mask):
            is_fused = [jax_attention.lower(mask, T, T, H, jnp.dtype(dtype)) is None for _ in range(2)]
    assert is_fused == [in_jax is None] * 2
    theirs = torch_attention.why_not_fused(mask, T, H, getattr(torch, dtype), device)
    with said_once(torch_attention, caplog, in_torch, mask):
        is_fused = [torch_attention.lower(mask, T, T, H, getattr(torch, dtype), device) is None for _ in range(2)]
    assert is_fused == [in_torch is None] * 2
    for why, expected in ((ours, in_jax), (theirs, in_torch)):
        assert (why is None) == (expected is None)
        assert expected is None or expected in why


def gpu_of(capability: float | None) -> SimpleNamespace:
    """A stand-in for JAX's device of a compute capability; for the CPU if None."""
    return SimpleNamespace(platform="cpu" if capability is None else "gpu", compute_capability=str(capability))


@contextlib.contextmanager
def said_once(module: Any, caplog: pytest.LogCaptureFixture, why: str | None, mask: AttentionMask) -> Iterator[None]:
    """`lower` says once that only a part of the mask makes attention plain. It is silent about a cache, which always
    does, and about a device or shape that cannot be fused anyway."""
    caplog.clear()
    module._say_plain.cache_clear()
    with caplog.at_level(logging.INFO, module.__name__):
        yield
    is_said = why in ("segments", "a sliding window") and mask.query_index_BT is None
    assert [record.name for record in caplog.records] == [module.__name__] * is_said
    assert not is_said or f"cannot compute {why}" in caplog.text


@pytest.mark.parametrize(
    ("model", "train", "capability", "in_jax", "in_torch"),
    [
        ({}, {}, 9.0, "fused attention (cuDNN)", "fused attention (SDPA)"),
        ({}, {}, None, "plain attention: the device is not a GPU", "fused attention (SDPA)"),
        ({"sliding_window": 7}, {}, 9.0, "fused attention (cuDNN)", "plain attention: a sliding window"),
        ({}, {"seq_len": 63}, 9.0, *["plain attention: the length 63 is odd"] * 2),
        ({"context_length": 321}, {}, 9.0, "fused attention (cuDNN)", "fused attention (SDPA)"),
        ({}, {"compute_dtype": "float32"}, 9.0, *["plain attention: the dtype is float32, not bfloat16"] * 2),
        ({"head_dim": 12}, {}, 9.0, *["plain attention: head_dim 12 is not a multiple of 8 up to 128"] * 2),
    ],
)
def test_describe_attention(
    model: dict[str, Any],
    train: dict[str, Any],
    capability: float | None,
    in_jax: str,
    in_torch: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a run logs, from the run's own length, dtype, head_dim and window."""
    config = run_config(replace(TINY, **model), **{"seq_len": 64, "compute_dtype": "bfloat16"} | train)
    with compiling_for(gpu_of(capability)):
        assert jax_attention.describe_attention(config) == in_jax
    device = torch.device("cpu" if capability is None else "cuda")
    monkeypatch.setattr(torch_attention, "default_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert torch_attention.describe_attention(config) == in_torch


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_and_block(module_pair: Pair, layer: int) -> None:
    x_jax, x_torch = both(module_pair, 2, LENGTH, module_pair.config.width)
    where_jax, where_torch = positions(module_pair)
    block_jax, block_torch = module_pair.jax.model.layers[layer], module_pair.torch.model.layers[layer]
    ours, _ = block_jax.self_attn(x_jax, where_jax, None)
    theirs, _ = block_torch.self_attn(x_torch, where_torch, None)
    agree(module_pair, f"layers.{layer}.self_attn", to_numpy(ours), to_numpy(theirs))
    ours, _ = block_jax(x_jax, where_jax, None)
    theirs, _ = block_torch(x_torch, where_torch, None)
    agree(module_pair, f"layers.{layer}", to_numpy(ours), to_numpy(theirs))
