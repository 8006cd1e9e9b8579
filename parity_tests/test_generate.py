"""Decoding: the same tokens from both frameworks, one compilation, the distribution asked for, whole characters."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.generation import BLOCK, BaseGenerator, bucket
from minillm_core.sampling import SamplingConfig, uniforms
from minillm_core.tokenizer import Tokenizer
from minillm_jax import generate as jax_generate
from minillm_torch import generate as torch_generate
from parity_tests.conftest import MODELS, TIERS, TINY, Pair, Tier, make_pair, random_weights, to_numpy, to_torch
from parity_tests.test_transformers import load_llama

BACKENDS = {"jax": minillm_jax, "torch": minillm_torch}
PROMPTS = [[1, 40, 41, 42, 43], [1], [1, *range(100, 117)]]


def generators(config: ModelConfig, tier: Tier, tokenizer: Tokenizer) -> dict[str, BaseGenerator]:
    pair = make_pair(config, tier)
    return {name: BACKENDS[name].Generator(getattr(pair, name), tokenizer) for name in BACKENDS}


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa-untied", "gqa-wide-heads-untied"])
def test_greedy_tokens_agree(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """200 tokens in float32, in both frameworks and in transformers, for rows of different length."""
    config = dataclasses.replace(MODELS[name], vocab_size=512)
    rows = {
        framework: generator.generate_tokens(PROMPTS, max_new_tokens=200, temperature=0.0)
        for framework, generator in generators(config, TIERS["float32"], tokenizer).items()
    }
    assert rows["jax"] == rows["torch"]
    assert max(map(len, rows["jax"])) > 100, "the model stopped early, so little was compared"
    llama = load_llama(config, random_weights(config), tmp_path, torch.float32)
    for prompt, row in zip(PROMPTS, rows["jax"], strict=True):
        out = llama.generate(
            to_torch(np.array([prompt])), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=200
        )[0, len(prompt) :].tolist()
        assert row == (out[: out.index(tokenizer.eos_id)] if tokenizer.eos_id in out else out)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 20}, {"top_p": 0.7}, {"temperature": 1.7, "top_k": 40, "top_p": 0.9}]
)
def test_same_seed_same_tokens(options: dict[str, Any], tier: Tier, tokenizer: Tokenizer) -> None:
    settings = {"max_new_tokens": 60, "temperature": 1.0, "seed": 11} | options
    both = generators(TINY, tier, tokenizer)
    rows = {name: generator.generate_tokens(PROMPTS, **settings) for name, generator in both.items()}
    assert rows["jax"] == rows["torch"]
    others = both["torch"].generate_tokens(PROMPTS, **(settings | {"seed": 12}))
    assert others != rows["torch"], "the seed has no effect"


def test_decode_compiles_once(tokenizer: Tokenizer) -> None:
    """One compilation of the decoding loop for any number of tokens, temperature and filter."""
    generator = generators(TINY, TIERS["float32"], tokenizer)["jax"]
    before = jax_generate._decode._cache_size()
    for n_tokens, options in ((3, {}), (50, {"top_k": 5}), (90, {"temperature": 1, "top_p": 1})):
        generator.generate_tokens([[1, 2 + n_tokens]], max_new_tokens=n_tokens, **options)
    capacities = {bucket(2 + n, TINY.context_length) for n in (3, 50, 90)}
    assert jax_generate._decode._cache_size() - before == len(capacities)
    generator.generate_tokens([[1, 7]], max_new_tokens=88, temperature=1.3)
    assert jax_generate._decode._cache_size() - before == len(capacities)


def test_the_cache_is_donated(tokenizer: Tokenizer) -> None:
    generator = generators(TINY, TIERS["float32"], tokenizer)["jax"]
    logits, cache = generator._prefill(np.ones((1, 16), np.int32), np.array([3], np.int32), 32)
    old = cache.layers[0].k_BSKH
    generator._decode((logits, cache), np.zeros((1, BLOCK), np.float32), 2, SamplingConfig())
    assert old.is_deleted()


def reference_tokens(pair: Pair, prompt: list[int], row: int, n: int, seed: int, **filters: Any) -> list[int]:
    """Sampling written out, without cache, padding or blocks: one Philox number per (seed, row, position)."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = to_numpy(pair.torch(torch.tensor([ids]))[0])[0, -1]
        cdf = np.cumsum(reference_filter(logits, **filters))
        number = int(np.random.Philox(key=(row << 64) | seed).random_raw(len(ids) + 1)[len(ids)]) >> 40
        ids.append(int(np.argmax(cdf > number / 2**24 * cdf[-1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "filters",
    [{"temperature": 1.0, "top_k": 0, "top_p": 1.0}, {"temperature": 1.7, "top_k": 40, "top_p": 0.9}],
)
def test_tokens_are_those_of_a_plain_loop(filters: dict[str, Any], float64: Tier, tokenizer: Tokenizer) -> None:
    """Both frameworks could draw the same wrong numbers; a loop without their machinery cannot."""
    pair = make_pair(TINY, float64)
    for name, generator in generators(TINY, float64, tokenizer).items():
        rows = generator.generate_tokens(PROMPTS, max_new_tokens=2 * BLOCK + 3, seed=11, **filters)
        for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
            expected = reference_tokens(pair, prompt, i, 2 * BLOCK + 3, 11, **filters)
            end = expected.index(tokenizer.eos_id) if tokenizer.eos_id in expected else None
            assert row == expected[:end], name


def test_large_vocabulary_draws_agree() -> None:
    """The same float32 logits give the same tokens over 32,000 pieces, where a float32 cumsum drifts.

    Measured: 0 of 800 draws differ (with torch's float32 cumsum 10 of 400 did); one may fall on a boundary elsewhere.
    """
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((200, 32_000))).astype(np.float32)
    numbers = (rng.integers(0, 2**24, 200) / 2**24).astype(np.float32)
    for filters in ((1.0, 0, 1.0), (0.8, 0, 0.95)):
        ours = np.asarray(jax_generate.sample(jnp.asarray(logits), jnp.asarray(numbers), *filters))
        theirs = torch_generate.sample(torch.from_numpy(logits), torch.from_numpy(numbers), *filters).numpy()
        assert (ours != theirs).sum() <= 1, f"{(ours != theirs).sum()} of 200 draws differ"


def reference_filter(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The filtered distribution, token by token, in plain Python."""
    scaled = logits / temperature
    probs = np.exp(scaled - scaled.max())
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))
    kept = order[: top_k or len(order)]
    mass = probs[kept].sum()
    nucleus, total = [], 0.0
    for token in kept:
        if nucleus and total >= top_p:
            break
        nucleus.append(token)
        total += probs[token] / mass
    out = np.zeros_like(probs)
    out[nucleus] = probs[nucleus] / probs[nucleus].sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 0.9), (1.5, 7, 1.0), (1.0, 12, 0.6), (1.0, 1, 1.0), (2.0, 0, 0.01)],
)
def test_samples_follow_the_filtered_distribution(temperature: float, top_k: int, top_p: float, float64: Tier) -> None:
    """Over an even grid of uniforms, each token is drawn in proportion to its probability, to within one draw."""
    logits = np.random.default_rng(0).standard_normal(50) * 2
    logits[10] = logits[20]  # a tie
    expected = reference_filter(logits, temperature, top_k, top_p)
    n = 5000
    grid = (np.arange(n) + 0.5) / n
    rows = np.tile(logits, (n, 1))
    ours = jax_generate.sample(jnp.asarray(rows), jnp.asarray(grid), temperature, top_k, top_p)
    theirs = torch_generate.sample(torch.from_numpy(rows), torch.from_numpy(grid), temperature, top_k, top_p)
    assert np.array_equal(np.asarray(ours), theirs.numpy())
    counts = np.bincount(np.asarray(ours), minlength=50)
    assert np.abs(counts - expected * n).max() <= 1.001


def test_uniforms() -> None:
    """Keyed by (seed, row, position): any start gives the same numbers; rows and seeds are independent."""
    whole = uniforms(5, 3, np.zeros(3, int), 1000)
    assert whole.dtype == np.float32
    assert whole.min() >= 0
    assert whole.max() < 1
    part = uniforms(5, 3, np.array([7, 500, 998]), 2)
    for row, start in enumerate([7, 500, 998]):
        assert np.array_equal(part[row], whole[row, start : start + 2])
    assert abs(np.corrcoef(whole)[np.triu_indices(3, 1)]).max() < 0.1
    assert not np.array_equal(uniforms(6, 1, np.zeros(1, int), 10), whole[:1, :10])
    assert abs(whole.mean() - 0.5) < 0.02


@pytest.mark.parametrize("framework", BACKENDS)
def test_stream_is_generate(framework: str, tokenizer: Tokenizer) -> None:
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    settings = {"max_new_tokens": 100, "temperature": 1.0, "seed": 4}
    pieces = list(generator.stream("The Congress", **settings))
    assert len(pieces) > 3
    assert "".join(pieces) == generator.generate(["The Congress"], **settings)[0]


@pytest.mark.parametrize("framework", BACKENDS)
def test_stops_at_the_end_of_the_document(framework: str, tokenizer: Tokenizer) -> None:
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    whole = generator.generate_tokens([[1, 9]], max_new_tokens=60, temperature=1.0)[0]
    generator.tokenizer = Tokenizer(tokenizer.path)
    generator.tokenizer.eos_id = whole[33]
    stopped = generator.generate_tokens([[1, 9]], max_new_tokens=60, temperature=1.0)[0]
    assert stopped == whole[: whole.index(whole[33])]
    prompt = generator.tokenizer.decode([9])
    streamed = "".join(generator.stream(prompt, max_new_tokens=60, temperature=1.0))
    assert streamed == generator.generate([prompt], max_new_tokens=60, temperature=1.0)[0]


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda g: g.generate([], max_new_tokens=3), "at least one prompt"),
        (lambda g: g.generate_tokens([[]], max_new_tokens=3), "at least one prompt"),
        (lambda g: g.generate_tokens([[1, 512]], max_new_tokens=3), "outside the vocabulary"),
        (lambda g: g.generate(["a"], max_new_tokens=0), "max_new_tokens"),
        (lambda g: g.generate(["word " * 400], max_new_tokens=3), "longer than the context"),
        (lambda g: g.generate(["a"], max_new_tokens=319), "at most 318 new tokens"),
        (lambda g: g.generate(["a"], max_new_tokens=3, temperature=-1.0), "temperature"),
        (lambda g: g.generate(["a"], max_new_tokens=3, temperature=float("nan")), "temperature"),
        (lambda g: g.generate(["a"], max_new_tokens=3, top_p=0.0), "top_p"),
        (lambda g: g.generate(["a"], max_new_tokens=3, top_k=-1), "top_k"),
    ],
)
def test_bad_requests(
    framework: str, request_of: Callable[[BaseGenerator], Any], message: str, tokenizer: Tokenizer
) -> None:
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    with pytest.raises(InputError, match=message):
        request_of(generator)


def test_tokenizer_of_another_vocabulary(tokenizer: Tokenizer) -> None:
    pair: Pair = make_pair(MODELS["gqa"], TIERS["float32"])
    for name, backend in BACKENDS.items():
        with pytest.raises(InputError, match=r"(?s)another vocabulary.*509 pieces.*512 pieces"):
            backend.Generator(getattr(pair, name), tokenizer)
