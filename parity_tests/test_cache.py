"""Cached equals uncached: prefill and single steps, chunks of uneven size, ragged rows, no silent overflow."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.errors import InputError
from minillm_jax.weights import split_model
from parity_tests.conftest import (
    MODELS,
    TIERS,
    Pair,
    Tier,
    assert_close,
    jax_forward,
    make_pair,
    random_tokens,
    to_numpy,
    to_torch,
)

BACKENDS = {"jax": minillm_jax, "torch": minillm_torch}


def new_cache(pair: Pair, framework: str, batch: int, capacity: int) -> Any:
    return BACKENDS[framework].init_cache(pair.config, batch, capacity, getattr(pair.tier, framework))


def call(pair: Pair, framework: str, tokens: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
    if framework == "jax":
        logits, cache = jax_forward(*split_model(pair.jax), tokens, cache)
    else:
        with torch.inference_mode():
            logits, cache = pair.torch(to_torch(tokens), cache)
    return to_numpy(logits), cache


def in_chunks(pair: Pair, framework: str, tokens: np.ndarray, sizes: Sequence[int], capacity: int) -> np.ndarray:
    cache = new_cache(pair, framework, len(tokens), capacity)
    parts, start = [], 0
    for size in sizes:
        logits, cache = call(pair, framework, tokens[:, start : start + size], cache)
        parts.append(logits)
        start += size
    return np.concatenate(parts, axis=1)


def test_cached_equals_uncached(pair: Pair) -> None:
    """A long prefill, single steps, and chunks of uneven size, against one pass without a cache."""
    sizes = [130, *[1] * 12, 40, 1, 130, 1]
    tokens = random_tokens(pair.config, 2, sum(sizes))
    expected = pair.logits(tokens)
    for framework, uncached in zip(BACKENDS, expected, strict=True):
        cached = in_chunks(pair, framework, tokens, sizes, capacity=320)
        assert_close(f"{framework} cached", cached, uncached, pair.tier.logits)


@pytest.mark.parametrize("framework", BACKENDS)
def test_rows_of_different_length(framework: str, float64: Tier) -> None:
    """Right-padded rows continue as if each were alone, whatever its padding and its neighbours."""
    pair = make_pair(MODELS["gqa"], float64)
    lengths = np.array([5, 17, 1])
    tokens = random_tokens(pair.config, 3, 17)
    cache = new_cache(pair, framework, 3, 24)
    prefill, cache = call(pair, framework, tokens, cache)
    length_B = jnp.asarray(lengths, jnp.int32) if framework == "jax" else to_torch(lengths)
    cache = dataclasses.replace(cache, length_B=length_B)
    continuation = random_tokens(pair.config, 3, 6, seed=9)
    logits, _ = call(pair, framework, continuation, cache)
    for row, length in enumerate(lengths):
        alone = np.concatenate([tokens[row, :length], continuation[row]])[None]
        expected, _ = call(pair, framework, alone, None)
        assert_close(f"row {row} prefill", prefill[row, :length], expected[0, :length], 1e-12)
        assert_close(f"row {row} continuation", logits[row], expected[0, length:], 1e-12)


@pytest.mark.parametrize("framework", BACKENDS)
def test_overflow_raises(framework: str) -> None:
    pair = make_pair(MODELS["gqa"], TIERS["float32"])
    model, as_tensor = (pair.jax, jnp.asarray) if framework == "jax" else (pair.torch, torch.from_numpy)
    cache = new_cache(pair, framework, 1, 8)
    _, cache = model(as_tensor(random_tokens(pair.config, 1, 6)), cache)
    before = to_numpy(cache.layers[1].k_BSKH)
    with pytest.raises(InputError, match=r"(?s)the cache is full.*at most 8 tokens.*6 cached \+ 3 new"):
        model(as_tensor(random_tokens(pair.config, 1, 3)), cache)
    assert np.array_equal(to_numpy(cache.layers[1].k_BSKH), before), "a refused call must not write"
    model(as_tensor(random_tokens(pair.config, 1, 2)), cache)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 641), np.int32), "more tokens than the context"),
        (np.array([[0, 509]]), "outside the vocabulary"),
        (np.array([[-1, 3]]), "outside the vocabulary"),
        (np.zeros((1, 4), np.float32), "not a batch of ids"),
    ],
    ids=["too-long", "too-large", "negative", "float"],
)
def test_bad_tokens(framework: str, tokens: np.ndarray, message: str) -> None:
    pair = make_pair(MODELS["gqa"], TIERS["float32"])
    model, as_tensor = (pair.jax, jnp.asarray) if framework == "jax" else (pair.torch, torch.from_numpy)
    with pytest.raises(InputError, match=message):
        model(as_tensor(tokens))


@pytest.mark.parametrize("framework", BACKENDS)
def test_no_cache_beyond_the_context(framework: str) -> None:
    """Positions past the rotary table would be clamped silently."""
    pair = make_pair(MODELS["gqa"], TIERS["float32"])
    with pytest.raises(InputError, match="longer than the context"):
        new_cache(pair, framework, 1, 641)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint8, np.int64])
def test_any_integer_dtype(dtype: type) -> None:
    pair = make_pair(MODELS["gqa"], TIERS["float32"])
    tokens = np.array([[3, 100, 7]])
    expected = to_numpy(pair.torch(to_torch(tokens))[0])
    assert_close("torch", to_numpy(pair.torch(torch.from_numpy(tokens.astype(dtype)))[0]), expected, 0.0)
    assert_close("jax", to_numpy(pair.jax(jnp.asarray(tokens.astype(dtype)))[0]), expected, 5e-5)
