"""Documents packed into one row equal each document alone, and a sliding window sees its tokens and no others."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minillm_core.config import ModelConfig
from minillm_core.data.batches import Batch
from minillm_core.errors import InputError
from minillm_core.model.mask import AttentionMask, effective_window
from minillm_core.model.reference import Reference
from minillm_core.model.rope import inverse_frequencies
from minillm_core.tensors import Tensors
from minillm_jax import attention as jax_attention
from minillm_jax import kv_cache as jax_kv_cache
from minillm_jax import loss as jax_loss
from minillm_jax import weights as jax_weights
from minillm_torch import attention as torch_attention
from minillm_torch import kv_cache as torch_kv_cache
from minillm_torch import loss as torch_loss
from minillm_torch import weights as torch_weights
from minillm_torch.device import to_device
from parity_tests.conftest import (
    BACKENDS,
    MODELS,
    Pair,
    Tier,
    assert_close,
    assert_close_norm,
    jax_forward,
    make_pair,
    random_tokens,
    to_numpy,
    to_torch,
)

LENGTHS = (7, 19, 1, 13)
"""Documents of one row."""
START = np.cumsum((0, *LENGTHS))
ROW = int(START[-1])
WINDOWED = {"gqa": MODELS["gqa"], "untied, window 5": replace(MODELS["mqa-untied"], sliding_window=5)}


def packed(config: ModelConfig, seed: int = 1) -> Batch:
    """Two rows: several documents in a row, and the same number of tokens as one document. Weights differ."""
    rng = np.random.default_rng(seed)
    segments_T = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    positions_T = np.concatenate([np.arange(n) for n in LENGTHS])
    return Batch(
        random_tokens(config, 2, ROW, seed),
        random_tokens(config, 2, ROW, seed + 1),
        rng.uniform(0.1, 2, (2, ROW)).astype(np.float32),
        np.stack([positions_T, np.arange(ROW)]).astype(np.int32),
        np.stack([5 - segments_T, np.full(ROW, 9)]).astype(np.int32),  # only equality matters
    )


def documents(batch: Batch) -> Batch:
    """The documents of `packed`, each in a row of its own, padded on the right with weight 0."""
    places = [(0, slice(a, b)) for a, b in itertools.pairwise(START)] + [(1, slice(ROW))]
    rows = [np.zeros((len(places), ROW), x.dtype) for x in (batch.tokens_BT, batch.targets_BT, batch.weights_BT)]
    for new, old in zip(rows, (batch.tokens_BT, batch.targets_BT, batch.weights_BT), strict=True):
        for i, (row, place) in enumerate(places):
            new[i, : place.stop - (place.start or 0)] = old[row, place]
    return Batch(*rows)


def in_row(alone: np.ndarray) -> np.ndarray:
    """Results (5, T, ...) of `documents`, at the places that they have in `packed`."""
    first = np.concatenate([row[:n] for row, n in zip(alone, LENGTHS, strict=False)])
    return np.stack([first, alone[-1]])


@partial(jax.jit, static_argnums=0)
def jax_loss_and_gradients(graphdef: Any, params: Any, rope: Any, batch: Batch) -> Any:
    return jax.value_and_grad(lambda p: jax_loss.loss_sums(jax_weights.merge_model(graphdef, p, rope), batch)[0])(
        params
    )


def logits_and_gradients(pair: Pair, framework: str, batch: Batch) -> tuple[np.ndarray, float, Tensors]:
    """Logits, the weighted sum of losses, and its gradients."""
    if framework == "jax":
        graphdef, params, rope = jax_weights.split_model(pair.jax)
        places = (batch.positions_BT, batch.segments_BT)
        logits, _ = jax_forward(graphdef, params, rope, batch.tokens_BT, None, None, *places)
        value, grads = jax_loss_and_gradients(graphdef, params, rope, batch)
        return to_numpy(logits), float(value), jax_weights.to_canonical(pair.config, grads)
    batch = to_device(batch, torch.device("cpu"))
    logits = pair.torch(batch.tokens_BT, None, None, batch.positions_BT, batch.segments_BT)[0]
    params = dict(pair.torch.named_parameters())
    value = torch_loss.loss_sums(pair.torch, batch)[0]
    grads = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
    return to_numpy(logits), value.item(), torch_weights.to_canonical(pair.config, grads)


def check_packed_row(pair: Pair, framework: str) -> None:
    batch = packed(pair.config)
    alone_logits, alone_loss, alone_grads = logits_and_gradients(pair, framework, documents(batch))
    logits, loss, grads = logits_and_gradients(pair, framework, batch)
    assert_close("logits", logits, in_row(alone_logits), pair.tier.logits)
    assert loss == pytest.approx(alone_loss, rel=pair.tier.run_loss)
    for name, grad in grads.items():
        assert_close_norm(name, grad, alone_grads[name], pair.tier.gradient)


def cached_logits(pair: Pair, framework: str, batch: Batch, chunks: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of rows that are given to the cache in chunks, and the keys of the last layer, (B, S, K, H)."""
    B, T = batch.tokens_BT.shape
    has_segments = batch.segments_BT is not None
    logits, start = [], 0
    if framework == "jax":
        cache: Any = jax_kv_cache.init_cache(pair.config, B, T + 3, pair.tier.jax, has_segments)
        forward = partial(jax_forward, *jax_weights.split_model(pair.jax))
    else:
        cache = torch_kv_cache.init_cache(pair.config, B, T + 3, pair.tier.torch, has_segments)
        forward = pair.torch
    for i, n in enumerate(chunks):
        if i == 1 and has_segments:  # the same rows in a cache of a different size
            rows = np.arange(B)
            module = jax_kv_cache if framework == "jax" else torch_kv_cache
            cache = module.take_rows(cache, rows if framework == "jax" else to_torch(rows), T + 1)
        tokens, positions, segments = (
            None if x is None else (x if framework == "jax" else to_torch(x))[:, start : start + n]
            for x in (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        )
        with torch.no_grad():
            out, cache = forward(tokens, cache, None, positions, segments)
        logits.append(to_numpy(out))
        start += n
    assert start == T
    return np.concatenate(logits, axis=1), to_numpy(cache.layers[-1].k_BKSH)[:, :, :T].swapaxes(1, 2)


def check_cached_row(pair: Pair, framework: str) -> None:
    """In chunks that end inside of documents, then token by token: the logits, and the rotated keys, which alone show
    the positions (RoPE makes attention depend only on their differences)."""
    batch = packed(pair.config)
    alone_logits, alone_keys = cached_logits(pair, framework, documents(batch), [ROW])
    logits, keys = cached_logits(pair, framework, batch, [20, 5] + [1] * (ROW - 25))
    assert_close("logits", logits, in_row(alone_logits), pair.tier.logits)
    assert_close("keys", keys, in_row(alone_keys), pair.tier.logits)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("model", WINDOWED)
def test_a_packed_row_equals_its_documents_alone(model: str, framework: str, float64: Tier) -> None:
    check_packed_row(make_pair(WINDOWED[model], float64), framework)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("model", WINDOWED)
def test_a_packed_row_equals_its_documents_alone_with_a_cache(model: str, framework: str, float64: Tier) -> None:
    check_cached_row(make_pair(WINDOWED[model], float64), framework)


@pytest.mark.parametrize("model", WINDOWED)
def test_the_frameworks_agree_on_a_packed_batch(model: str, tier: Tier) -> None:
    pair = make_pair(WINDOWED[model], tier)
    (ours, our_loss, our_grads), (theirs, their_loss, their_grads) = (
        logits_and_gradients(pair, framework, packed(pair.config)) for framework in BACKENDS
    )
    assert_close("logits", ours, theirs, tier.logits)
    assert our_loss == pytest.approx(their_loss, rel=tier.run_loss)
    for name, grad in our_grads.items():
        assert_close_norm(name, grad, their_grads[name], tier.gradient)


def check_positions(pair: Pair, framework: str) -> None:
    """Positions with gaps, without a cache, against the numpy reference: logits and loss. (Positions that only begin
    later give the same result, because RoPE makes attention depend only on their differences.)"""
    tokens = random_tokens(pair.config, 1, 40)
    batch = replace(Batch.from_tokens(tokens), positions_BT=3 * np.arange(40, dtype=np.int32)[None])
    three_times = Reference(pair.config, pair.weights, lambda config: 3 * inverse_frequencies(config))
    *_, (_, expected) = three_times.stages(tokens)
    logits, loss, _ = logits_and_gradients(pair, framework, batch)
    assert_close("logits", logits, expected, pair.tier.logits)
    log_probs = expected[0] - np.logaddexp.reduce(expected[0], axis=1, keepdims=True)
    assert_close("loss", np.array(loss), np.array(-log_probs[range(39), tokens[0, 1:]].sum()), 1e-12)


@pytest.mark.parametrize("framework", BACKENDS)
def test_positions_with_gaps_equal_the_reference(framework: str, float64: Tier) -> None:
    check_positions(make_pair(MODELS["gqa"], float64), framework)


def check_window(pair: Pair, framework: str) -> None:
    """Against the numpy reference, in one call without and with a cache, and token by token."""
    tokens = random_tokens(pair.config, 1, 40)
    *_, (name, expected) = Reference(pair.config, pair.weights).stages(tokens)
    assert name == "logits"
    assert_close(name, pair.logits(tokens)[framework == "torch"], expected, pair.tier.logits)
    assert_close(name, cached_logits(pair, framework, Batch.from_tokens(tokens), [40])[0], expected, pair.tier.logits)
    assert_close(name, cached_logits(pair, framework, Batch.from_tokens(tokens), [9] + [1] * 31)[0], expected, 1e-12)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("window", [1, 5, 39, 40, 41])
def test_sliding_window_equals_the_reference(window: int, framework: str, float64: Tier) -> None:
    check_window(make_pair(replace(MODELS["gqa"], sliding_window=window), float64), framework)


def test_a_window_that_hides_nothing_is_no_window() -> None:
    found = [effective_window(window, 40) for window in (None, 1, 39, 40, 41)]
    assert found == [None, 1, 39, None, None]


@pytest.mark.parametrize("framework", BACKENDS)
def test_a_window_reaches_as_far_as_it_says(framework: str, float64: Tier) -> None:
    """With one layer, token 10 changes the logits of tokens 10 to 10 + window - 1."""
    pair = make_pair(replace(MODELS["gqa"], n_layers=1, sliding_window=6), float64)
    tokens = random_tokens(pair.config, 1, 30)
    changed = tokens.copy()
    changed[0, 10] = (changed[0, 10] + 1) % pair.config.vocab_size
    before, after = (pair.logits(x)[framework == "torch"] for x in (tokens, changed))
    assert np.flatnonzero(np.abs(after - before).max(axis=-1)[0]).tolist() == [*range(10, 16)]


MASKS = [
    AttentionMask(None),
    AttentionMask(1),
    AttentionMask(4),
    AttentionMask(None, np.array([[2, 3, 4], [0, 1, 2]])),
    AttentionMask(3, np.array([[5, 6, 7], [0, 1, 2]])),
    AttentionMask(3, None, np.array([[1, 1, 0], [2, 2, 2]]), np.array([[1, 1, 0], [2, 2, 2]])),
    AttentionMask(
        2, np.array([[5, 6, 7], [3, 4, 5]]), np.array([[1, 1, 3]] * 2), np.array([[0, 0, 0, 0, 1, 1, 1, 3]] * 2)
    ),
]


@pytest.mark.parametrize("mask", MASKS, ids=range(len(MASKS)))
def test_mask_bias_equals_its_description(mask: AttentionMask) -> None:
    """Every field, alone and together, against loops over the words of the description."""
    T, S = 3, 3 if mask.query_index_BT is None else 8
    ours = jax_attention.mask_bias(mask, T, S, jnp.float32)
    arrays = (mask.query_index_BT, mask.query_segments_BT, mask.key_segments_BS)
    on_torch = AttentionMask(mask.window, *(None if x is None else to_torch(x) for x in arrays))
    theirs = torch_attention.mask_bias(on_torch, T, S, torch.float32, torch.device("cpu"))
    index = np.broadcast_to(np.arange(T) if mask.query_index_BT is None else mask.query_index_BT, (2, T))
    for b, t, s in np.ndindex(ours.shape):
        sees = s <= index[b, t]
        if mask.window is not None:
            sees = sees and s in range(index[b, t] - mask.window + 1, index[b, t] + 1)
        if mask.query_segments_BT is not None:
            sees = sees and mask.query_segments_BT[b, t] == mask.key_segments_BS[b, s]
        assert float(ours[b, t, s]) == float(theirs[b, t, s]) == (0 if sees else -np.inf), (b, t, s)


# What a careless port would do, by the name of the function that it replaces.
def segment_ignored(mask_bias: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mask, *rest: mask_bias(replace(mask, query_segments_BT=None, key_segments_BS=None), *rest)


def window_one_longer(mask_bias: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mask, *rest: mask_bias(replace(mask, window=mask.window + 1), *rest)


def window_one_shorter(mask_bias: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mask, *rest: mask_bias(replace(mask, window=mask.window - 1), *rest)


def places_forgotten(mask_bias: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mask, *rest: mask_bias(replace(mask, query_index_BT=None), *rest)


def segments_not_stored(append_segments: Callable[..., Any]) -> Callable[..., Any]:
    return lambda cache, segments_BT, index_BT: cache


def positions_left_out(loss_sums: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, batch, **options: loss_sums(model, replace(batch, positions_BT=None), **options)


def position_not_restarted(check_like: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tokens, name, array, limit: None if name == "positions_BT" else check_like(tokens, name, array, limit)


MISTAKES = {
    "segment ignored": ("attention.mask_bias", segment_ignored, check_packed_row),
    "segment ignored, cache": ("attention.mask_bias", segment_ignored, check_cached_row),
    "segments not stored": ("model.append_segments", segments_not_stored, check_cached_row),
    "window one longer": ("attention.mask_bias", window_one_longer, check_window),
    "window one shorter": ("attention.mask_bias", window_one_shorter, check_window),
    "places forgotten": ("attention.mask_bias", places_forgotten, check_cached_row),
    "positions left out of the loss": ("loss.loss_sums", positions_left_out, check_positions),
    "position not restarted": ("model.check_like", position_not_restarted, check_cached_row),
}


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(
    mistake: str, framework: str, float64: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plant, check = MISTAKES[mistake]
    pair = make_pair(WINDOWED["untied, window 5"], float64)
    module_name, function = path.split(".")
    module = getattr(BACKENDS[framework], module_name)
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    jax.clear_caches()  # the programs compiled without the mistake
    with pytest.raises(AssertionError, match=r"differs by|not finite"):
        check(pair, framework)
    jax.clear_caches()


@pytest.mark.parametrize("attention", [jax_attention, torch_attention], ids=BACKENDS)
def test_a_kernel_refuses_what_it_cannot_express(attention: Any) -> None:
    """No part of a mask can be dropped: the fused kernel computes it or raises."""
    xp = jnp if attention is jax_attention else torch
    x = xp.zeros((1, 4, 2, 8))
    ones = xp.ones((1, 4))
    masks = [AttentionMask(None, None, ones, ones), AttentionMask(None, ones)]
    for one_sided in ((ones, None), (None, ones)):
        with pytest.raises(InputError, match="incomplete attention mask"):
            AttentionMask(None, None, *one_sided)
    if attention is torch_attention:
        masks.append(AttentionMask(3))
    for mask in masks:
        with pytest.raises(InputError, match="the fused attention kernel cannot compute this mask"):
            attention.attend_fused(x, x, x, mask)


@pytest.mark.parametrize("framework", BACKENDS)
def test_bad_positions_and_segments(framework: str, float64: Tier) -> None:
    pair = make_pair(MODELS["gqa"], float64)
    make = jnp.asarray if framework == "jax" else to_torch
    model, tokens = getattr(pair, framework), make(random_tokens(pair.config, 2, 5))
    module = jax_kv_cache if framework == "jax" else torch_kv_cache
    positions = np.tile(np.arange(5), (2, 1))
    for position in (640, -1):
        with pytest.raises(InputError, match=f"positions_BT is out of range[^$]*0 to 639[^$]*{position}"):
            model(tokens, None, None, make(positions | position if position < 0 else positions + position - 4))
    with pytest.raises(InputError, match="segments_BT does not fit the tokens"):
        model(tokens, None, None, None, make(positions[:, :4]))
    with pytest.raises(InputError, match="segments_BT does not fit the tokens"):
        model(tokens, None, None, None, make(positions) * 1.5)
    for with_segments, segments in ((True, None), (False, make(positions))):
        cache = module.init_cache(pair.config, 2, 8, getattr(pair.tier, framework), with_segments)
        with pytest.raises(InputError, match="the segments do not fit the cache"):
            model(tokens, cache, None, None, segments)


@pytest.mark.parametrize("framework", BACKENDS)
def test_the_cache_keeps_its_segments(framework: str, float64: Tier) -> None:
    """In reordered and repeated rows of a larger or smaller cache, and if one cache is continued twice."""
    pair = make_pair(MODELS["gqa"], float64)
    make = jnp.asarray if framework == "jax" else to_torch
    module = jax_kv_cache if framework == "jax" else torch_kv_cache
    model = partial(jax_forward, *jax_weights.split_model(pair.jax)) if framework == "jax" else pair.torch
    tokens, segments = random_tokens(pair.config, 2, 5), np.array([[1, 1, 2, 2, 3], [4, 5, 5, 5, 6]])
    with torch.inference_mode():
        cache = module.init_cache(pair.config, 2, 8, getattr(pair.tier, framework), True)
        _, cache = model(make(tokens), cache, None, None, make(segments))
        order = np.array([1, 0, 1])
        for capacity in (6, 12):
            taken = module.take_rows(cache, make(order), capacity)
            assert np.array_equal(to_numpy(taken.segments_BS)[:, :5], segments[order]), capacity
        twice = [model(make(tokens[:, :1]), cache, None, None, make(segments[:, :1] * n))[1] for n in (7, 8)]
    for n, continued in zip((7, 8), twice, strict=True):
        assert to_numpy(continued.segments_BS)[:, 5].tolist() == [n, 4 * n]


def test_bad_window() -> None:
    for window in (0, -3):
        with pytest.raises(InputError, match=f"sliding_window is out of range[^$]*found: {window}"):
            replace(MODELS["gqa"], sliding_window=window)
