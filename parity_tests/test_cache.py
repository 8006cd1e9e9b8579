"""The KV cache: cached equals uncached for any chunks, a cache can be continued many times, and it never overflows.

`test_planted_faults_are_caught` plants the classic cache bugs and shows that these checks catch each of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm_jax
import minillm_torch
from minillm_core.errors import InputError
from minillm_core.model.mask import AttentionMask
from minillm_jax import kv_cache as jax_kv_cache
from minillm_jax.weights import split_model
from parity_tests.conftest import (
    MODELS,
    TIERS,
    TINY,
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


def call(
    pair: Pair, framework: str, tokens: np.ndarray, cache: Any, valid: np.ndarray | None = None
) -> tuple[np.ndarray, Any]:
    if framework == "jax":
        logits, cache = jax_forward(*split_model(pair.jax), tokens, cache, valid)
    else:
        with torch.inference_mode():
            logits, cache = pair.torch(to_torch(tokens), cache, None if valid is None else to_torch(valid))
    return to_numpy(logits), cache


def in_chunks(pair: Pair, framework: str, tokens: np.ndarray, sizes: Sequence[int], capacity: int) -> np.ndarray:
    cache = new_cache(pair, framework, len(tokens), capacity)
    parts, start = [], 0
    for size in sizes:
        logits, cache = call(pair, framework, tokens[:, start : start + size], cache)
        parts.append(logits)
        start += size
    return np.concatenate(parts, axis=1)


def check_chunks(pair: Pair, framework: str, sizes: Sequence[int], capacity: int) -> None:
    """Chunks of these sizes, with a cache, give the logits of one pass over `capacity` tokens without a cache."""
    tokens = random_tokens(pair.config, 2, capacity)
    uncached, _ = call(pair, framework, tokens, None)
    cached = in_chunks(pair, framework, tokens, sizes, capacity)
    assert_close(f"{framework} cached", cached, uncached[:, : sum(sizes)], pair.tier.logits)


def check_ragged_rows(pair: Pair, framework: str, pieces: Sequence[Sequence[int]], capacity: int) -> None:
    """Each piece adds its number of real tokens to each row, padded to the longest. Each row equals the row alone."""
    totals = np.sum(pieces, axis=0)
    tokens = random_tokens(pair.config, len(totals), capacity)
    cache = new_cache(pair, framework, len(totals), capacity)
    done = np.zeros(len(totals), int)
    expected = [call(pair, framework, tokens[[row]], None)[0][0] for row in range(len(totals))]
    for piece in map(np.array, pieces):
        padded = random_tokens(pair.config, len(totals), max(piece.max(), 1), seed=99)  # padding may be any token
        for row, n in enumerate(piece):
            padded[row, :n] = tokens[row, done[row] : done[row] + n]
        logits, cache = call(pair, framework, padded, cache, piece.astype(np.int32))
        for row, n in enumerate(piece):
            if n:
                there = expected[row][done[row] : done[row] + n]
                assert_close(f"{framework} row {row}", logits[row, :n], there, pair.tier.logits)
        done += piece


def check_overflow(pair: Pair, framework: str) -> None:
    """A call that does not fit in the cache raises and writes nothing, not even over the last tokens."""
    model, as_tensor = (pair.jax, jnp.asarray) if framework == "jax" else (pair.torch, torch.from_numpy)
    tokens = random_tokens(pair.config, 1, 9)
    expected, _ = call(pair, framework, tokens[:, :8], None)
    _, cache = call(pair, framework, tokens[:, :6], new_cache(pair, framework, 1, 8))
    before = [to_numpy(layer.k_BKSH).copy() for layer in cache.layers]
    refusal, after = None, cache
    try:
        _, after = model(as_tensor(tokens[:, 6:]), cache)
    except InputError as error:
        refusal = str(error)
    for layer, kept in zip(after.layers, before, strict=True):
        assert np.array_equal(to_numpy(layer.k_BKSH)[:, :, :6], kept[:, :, :6]), "a cached token was overwritten"
    assert refusal is not None
    assert "the cache is full" in refusal
    assert "at most 8 tokens" in refusal
    assert "6 cached + 3 new" in refusal
    logits, _ = call(pair, framework, tokens[:, 6:8], cache)
    assert_close("after the refusal", logits, expected[:, 6:], pair.tier.logits)


def test_cached_equals_uncached(pair: Pair) -> None:
    """A long prefill, single steps, and chunks of uneven size; then both frameworks against each other."""
    sizes = [130, *[1] * 12, 40, 1, 130, 1]
    for framework in BACKENDS:
        check_chunks(pair, framework, sizes, capacity=320)
    ours, theirs = pair.logits(random_tokens(pair.config, 2, 320))
    assert_close("jax against torch", ours, theirs, pair.tier.logits)


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.sampled_from([1, 1, 2, 3, 7, 16]), min_size=1, max_size=6), full=st.booleans())
@pytest.mark.parametrize("framework", BACKENDS)
def test_chunks_of_any_size(framework: str, sizes: list[int], full: bool) -> None:
    """In a cache with room to spare, and in a cache that is filled completely."""
    capacity = 96
    with jax.enable_x64(True):
        sizes += [1] * (capacity - sum(sizes)) * full
        check_chunks(make_pair(TINY, TIERS["float64"]), framework, sizes, capacity)


@settings(max_examples=12, deadline=None)
@given(
    pieces=st.lists(st.tuples(*[st.sampled_from([0, 1, 2, 5, 8])] * 3), min_size=1, max_size=4).filter(
        lambda pieces: all(sum(row) > 0 for row in zip(*pieces, strict=True))
    )
)
@pytest.mark.parametrize("framework", BACKENDS)
def test_rows_of_any_length(framework: str, pieces: list[tuple[int, ...]]) -> None:
    """A row does not depend on its neighbours or the padding. In some calls, a row gets no new token."""
    with jax.enable_x64(True):
        check_ragged_rows(make_pair(TINY, TIERS["float64"]), framework, pieces, capacity=48)


@pytest.mark.parametrize("framework", BACKENDS)
def test_rows_of_different_length_with_a_window(framework: str, float64: Tier) -> None:
    pair = make_pair(dataclasses.replace(TINY, sliding_window=4), float64)
    check_ragged_rows(pair, framework, [(5, 2, 8), (1, 1, 1), (0, 5, 1), (1, 1, 1)], capacity=48)


@pytest.mark.parametrize("framework", BACKENDS)
def test_cache_can_be_continued_many_times(framework: str, float64: Tier) -> None:
    """Three continuations of one prompt, with interleaved steps; then the cache of the prompt is used once more.

    This must also hold in torch, which writes in place.
    """
    pair = make_pair(MODELS["gqa"], float64)
    prompt, n = random_tokens(pair.config, 2, 9), 5
    _, kept = call(pair, framework, prompt, new_cache(pair, framework, 2, 32))
    branches = [(random_tokens(pair.config, 2, n, seed=s), kept) for s in (2, 3, 4)]
    expected = [call(pair, framework, np.concatenate([prompt, tokens], 1), None)[0] for tokens, _ in branches]
    for step in range(n):
        for i, (tokens, cache) in enumerate(branches):
            logits, cache = call(pair, framework, tokens[:, [step]], cache)
            assert_close(f"branch {i} step {step}", logits[:, 0], expected[i][:, 9 + step], 1e-12)
            branches[i] = tokens, cache
    whole, _ = call(pair, framework, branches[1][0], kept)
    assert_close("the kept cache", whole, expected[1][:, 9:], 1e-12)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("framework", BACKENDS)
def test_take_rows(framework: str, window: int | None, float64: Tier) -> None:
    """Reordered and repeated rows continue as before in a larger or smaller cache; the old cache stays valid."""
    pair = make_pair(dataclasses.replace(MODELS["gqa"], sliding_window=window), float64)
    tokens, lengths = random_tokens(pair.config, 3, 9), np.array([9, 4, 6], np.int32)
    _, cache = call(pair, framework, tokens, new_cache(pair, framework, 3, 16), lengths)
    order = np.array([2, 0, 2, 1])
    kv_cache = __import__(f"minillm_{framework}.kv_cache", fromlist=["take_rows"])
    for capacity in (24, 12):
        taken = kv_cache.take_rows(cache, order if framework == "jax" else to_torch(order), capacity)
        assert taken.capacity == capacity
        more = random_tokens(pair.config, 4, 3, seed=5)
        for source, rows in ((cache, None), (taken, order)):
            news = more if rows is not None else more[:3]
            logits, _ = call(pair, framework, news, source)
            for i, row in enumerate(range(3) if rows is None else rows):
                n = lengths[row]
                alone = np.zeros((1, 12), np.int32)  # one shape, compiled once
                alone[0, : n + 3] = [*tokens[row, :n], *news[i]]
                expected, _ = call(pair, framework, alone, None)
                assert_close(f"row {i}", logits[i], expected[0, n : n + 3], 1e-12)


@pytest.mark.parametrize("framework", BACKENDS)
def test_overflow_raises(framework: str) -> None:
    check_overflow(make_pair(MODELS["gqa"], TIERS["float32"]), framework)


def top_left(mask_bias: Callable[..., Any], framework: str) -> Callable[..., Any]:
    """A causal mask aligned with the first key: places are counted from the start of the call, not of the text."""

    def faulty(mask: AttentionMask, *rest: Any) -> Any:
        index = mask.query_index_BT
        index = None if index is None else index - index[:, :1]
        return mask_bias(dataclasses.replace(mask, query_index_BT=index), *rest)

    return faulty


def pad_attended(mask_bias: Callable[..., Any], framework: str) -> Callable[..., Any]:
    """Every row sees as many keys as the longest row of the batch."""

    def faulty(mask: AttentionMask, *rest: Any) -> Any:
        index = mask.query_index_BT
        if index is not None:
            index = (index.max(axis=0) if framework == "jax" else index.amax(dim=0))[None] + 0 * index
        return mask_bias(dataclasses.replace(mask, query_index_BT=index), *rest)

    return faulty


def padded_width(cache_class: type, framework: str) -> Callable[..., Any]:
    """After a padded chunk, every row continues at the padded width."""

    def faulty(layers: Any, length: Any, *rest: Any) -> Any:
        return cache_class(layers, 0 * length + length.max(), *rest)

    return faulty


def clamped_write(slots: Callable[..., Any], framework: str) -> Callable[..., Any]:
    """A write past the end is moved to the end and overwrites what is there."""

    def faulty(cache: Any, position: Any) -> Any:
        over = position[:, -1:] + 1 - cache.capacity
        return slots(cache, position - (jnp.maximum(over, 0) if framework == "jax" else over.clamp(min=0)))

    return faulty


FAULTS = {
    "top-left causal mask": ("attention", "mask_bias", top_left, lambda pair, f: check_chunks(pair, f, [5, 1, 3], 16)),
    "pad attended to": (
        "attention",
        "mask_bias",
        pad_attended,
        lambda pair, f: check_ragged_rows(pair, f, [(5, 2), (1, 1)], 16),
    ),
    "position = padded width": (
        "model",
        "KVCache",
        padded_width,
        lambda pair, f: check_ragged_rows(pair, f, [(5, 2), (1, 1)], 16),
    ),
    "clamped write": ("model", "slots", clamped_write, check_overflow),
}


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, framework: str, float64: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    module_name, name, plant, check = FAULTS[fault]
    # A unique configuration, so that JAX shares no compiled program between this test and others.
    config = dataclasses.replace(TINY, rope_theta=10_000.0 + list(FAULTS).index(fault) + 1)
    pair = make_pair(config, float64)
    module = __import__(f"minillm_{framework}.{module_name}", fromlist=[name])
    monkeypatch.setattr(module, name, plant(getattr(module, name), framework))
    if fault == "clamped write":  # remove the check that would refuse the call first
        model = __import__(f"minillm_{framework}.model", fromlist=["check_room"])
        monkeypatch.setattr(model, "check_room", lambda *_: None)
    with pytest.raises(AssertionError, match="overwritten" if fault == "clamped write" else "differs by"):
        check(pair, framework)
    monkeypatch.undo()
    check(dataclasses.replace(make_pair(dataclasses.replace(config, norm_eps=2e-6), float64)), framework)


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
def test_bad_rows(framework: str) -> None:
    """Batch sizes that differ from the cache's, and impossible counts of real tokens."""
    pair = make_pair(TINY, TIERS["float32"])
    model, as_tensor = (pair.jax, jnp.asarray) if framework == "jax" else (pair.torch, torch.from_numpy)
    cache = new_cache(pair, framework, 2, 8)
    tokens = as_tensor(random_tokens(TINY, 2, 3))
    for rows in (1, 3):
        with pytest.raises(InputError, match="number of rows differs"):
            model(as_tensor(random_tokens(TINY, rows, 3)), cache)
    for valid in ([4, 1], [-1, 1], [1], [1, 1, 1]):
        with pytest.raises(InputError, match="valid_B is out of range"):
            model(tokens, cache, as_tensor(np.array(valid)))
    with pytest.raises(InputError, match="needs a cache"):
        model(tokens, None, as_tensor(np.array([1, 1])))


def test_torch_inference_and_grad_modes() -> None:
    """A cache made in inference mode can be continued outside it. With gradients, nothing is written in place: backward
    works, and one chunk gives the same gradient as three."""
    pair = make_pair(TINY, TIERS["float32"])
    tokens = to_torch(random_tokens(TINY, 2, 7))
    with torch.inference_mode():
        _, made = pair.torch(tokens[:, :4], new_cache(pair, "torch", 2, 8))
    with torch.no_grad():
        logits, _ = pair.torch(tokens[:, 4:], made)
    assert_close("outside", to_numpy(logits), pair.logits(tokens.numpy())[1][:, 4:], 5e-5)
    weight = pair.torch.model.layers[0].self_attn.k_proj.weight
    grads = []
    for chunks in ([7], [4, 2, 1]):
        start = new_cache(pair, "torch", 2, 8)
        cache, total = start, torch.zeros(())
        for piece in tokens.split(chunks, dim=1):
            logits, cache = pair.torch(piece, cache)
            total = total + torch.logsumexp(logits, -1).sum()
        grads.append(to_numpy(torch.autograd.grad(total, weight)[0]))
        assert not start.layers[0].k_BKSH.requires_grad
    assert_close("gradient through the cache", grads[1], grads[0], 1e-4)


@pytest.mark.parametrize("framework", BACKENDS)
def test_cache_longer_than_context_is_refused(framework: str) -> None:
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


def test_one_token_without_a_scatter() -> None:
    """What JAX does on a GPU for one token of one row: the same cache, also for an index outside of it."""
    rng = np.random.default_rng(0)
    old, new = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 2, 5, 4), (1, 1, 2, 4)))
    for index in (0, 4, 5):
        slots = jnp.arange(1)[:, None, None], jnp.arange(2)[None, None], jnp.full((1, 1, 1), index)
        ours, expected = (put(old, new, slots) for put in (jax_kv_cache._put_one, jax_kv_cache._put))
        assert np.array_equal(ours, expected), index
