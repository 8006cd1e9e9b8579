"""Decoding: the same request gives the same tokens in both frameworks, and each row equals its prompt alone."""

import dataclasses
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_core.config import ModelConfig
from minillm_core.decoding import generation
from minillm_core.decoding.generation import BLOCK, BaseGenerator, Completion, bucket
from minillm_core.decoding.sampling import Filters, SamplingConfig, row_key
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import Tokenizer
from minillm_jax import generate as jax_generate
from minillm_jax.weights import split_model
from parity_tests.conftest import (
    BACKENDS,
    MODELS,
    TIERS,
    TINY,
    Pair,
    Tier,
    make_pair,
    random_weights,
    to_numpy,
    to_torch,
)
from parity_tests.test_transformers import load_llama

PROMPTS = [[1, 40, 41, 42, 43], [1], [1, *range(100, 117)]]


@lru_cache
def generators(config: ModelConfig, tier: Tier, tokenizer: Tokenizer) -> dict[str, BaseGenerator]:
    pair = make_pair(config, tier)
    return {name: BACKENDS[name].Generator(getattr(pair, name), tokenizer) for name in BACKENDS}


def complete(generator: BaseGenerator, prompts: Any, **options: Any) -> list[Completion]:
    return generator.generate(prompts, logprobs=True, **options)


def tokens_of(generator: BaseGenerator, prompts: Any, **options: Any) -> list[list[int]]:
    return [completion.tokens for completion in complete(generator, prompts, **options)]


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa-untied", "gqa-wide-heads-untied", "gqa with a window"])
def test_greedy_tokens_agree(name: str, tokenizer: Tokenizer, tmp_path: Any) -> None:
    """200 tokens in float32, in both frameworks and in transformers, for rows of different length."""
    window = 16 if "window" in name else None
    config = dataclasses.replace(MODELS[name.partition(" ")[0]], vocab_size=512, sliding_window=window)
    rows = {
        framework: tokens_of(generator, PROMPTS, max_new_tokens=200, temperature=0.0)
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


def test_repetition_penalty_matches_transformers(tokenizer: Tokenizer, tmp_path: Any) -> None:
    config = dataclasses.replace(MODELS["gqa"], vocab_size=512)
    llama = load_llama(config, random_weights(config), tmp_path, torch.float32)
    options = {"max_new_tokens": 80, "repetition_penalty": 1.3}
    prompt = PROMPTS[2]
    expected = llama.generate(to_torch(np.array([prompt])), do_sample=False, **options)[0, len(prompt) :].tolist()
    for generator in generators(config, TIERS["float32"], tokenizer).values():
        row = tokens_of(generator, [prompt], temperature=0.0, **options)[0]
        assert row == expected[: len(row)]
        assert len(row) > 40
        assert row != tokens_of(generator, [prompt], temperature=0.0, max_new_tokens=80)[0]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 20},
    {"top_p": 0.7},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_same_seed_same_tokens(options: dict[str, Any], tier: Tier, tokenizer: Tokenizer) -> None:
    request = {"max_new_tokens": 60, "temperature": 1.0, "seed": 11} | options
    both = generators(TINY, tier, tokenizer)
    rows = {name: complete(generator, PROMPTS, n=2, **request) for name, generator in both.items()}
    for ours, theirs in zip(rows["jax"], rows["torch"], strict=True):
        assert (ours.text, ours.tokens, ours.finish_reason) == (theirs.text, theirs.tokens, theirs.finish_reason)
        assert np.abs(np.subtract(ours.logprobs, theirs.logprobs)).max() <= tier.logits
    tokens = [completion.tokens for completion in rows["torch"]]
    assert len({tuple(row) for row in tokens}) == len(tokens), "two rows drew the same numbers"
    assert tokens_of(both["torch"], PROMPTS, n=2, **(request | {"seed": 12})) != tokens, "the seed has no effect"


@pytest.mark.extended
def test_thousand_continuations_agree(float64: Tier, tokenizer: Tokenizer) -> None:
    """1,000 sampled continuations in float64, with many options and lengths, agree without exception."""
    both = generators(TINY, float64, tokenizer)
    rng = np.random.default_rng(0)
    n_tokens = 0
    for seed in range(10):
        prompts = [[1, *rng.integers(4, 512, rng.integers(0, 30)).tolist()] for _ in range(25)]
        request = {"max_new_tokens": 24, "temperature": 1.0, "seed": seed, "n": 4} | OPTIONS[seed % len(OPTIONS)]
        ours, theirs = (tokens_of(generator, prompts, **request) for generator in both.values())
        assert len(ours) == 100
        assert ours == theirs
        n_tokens += sum(map(len, ours))
    assert n_tokens > 15_000


def reference_tokens(pair: Pair, prompt: list[int], sample: int, n: int, seed: int, penalty: float) -> list[int]:
    """A plain sampling loop without cache, padding or blocks: a Philox number per (seed, prompt, sample, position)."""
    key = row_key(prompt, sample)
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = to_numpy(pair.torch(torch.tensor([ids]))[0])[0, -1]
        for token in set(ids):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits = logits / 1.7
        probs = np.exp(logits - logits.max())
        order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))[:40]
        mass, nucleus = probs[order].sum(), []
        while sum(probs[nucleus]) / mass < 0.9:
            nucleus.append(order[len(nucleus)])
        kept = np.zeros_like(probs)
        kept[nucleus] = probs[nucleus]
        number = int(np.random.Philox(key=(key << 64) | seed).random_raw(len(ids) + 1)[len(ids)]) >> 40
        cdf = np.cumsum(kept)
        ids.append(int(np.argmax(cdf > number / 2**24 * cdf[-1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_tokens_match_a_plain_loop(penalty: float, float64: Tier, tokenizer: Tokenizer) -> None:
    """Both frameworks could share a bug and agree on wrong tokens; a plain loop does not share it."""
    pair, n = make_pair(TINY, float64), 2 * BLOCK + 3
    options = {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": penalty, "seed": 11, "n": 2}
    for name, generator in generators(TINY, float64, tokenizer).items():
        rows = tokens_of(generator, PROMPTS, max_new_tokens=n, **options)
        for i, row in enumerate(rows):
            expected = reference_tokens(pair, PROMPTS[i // 2], i % 2, n, 11, penalty)
            end = expected.index(tokenizer.eos_id) if tokenizer.eos_id in expected else None
            assert row == expected[:end], name


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 8, 41, 50]), min_size=5, max_size=6),  # each bucket is compiled
    seed=st.integers(0, 1000),
    options=st.sampled_from([{"temperature": 0.0}, *OPTIONS]),
)
@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_each_row_equals_its_prompt_alone(
    framework: str, tokenizer: Tokenizer, lengths: list[int], seed: int, options: dict[str, Any]
) -> None:
    """Exact tokens, log-probabilities to 1e-12, for any neighbours. Some rows end early, so the batch shrinks."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(4, 512, length).tolist() for length in lengths]
    request = {"max_new_tokens": 40, "temperature": 1.0, "seed": seed, "stop": list(range(4, 24))} | options
    with jax.enable_x64(True):
        generator = generators(TINY, TIERS["float64"], tokenizer)[framework]
        together = complete(generator, prompts, **request)
        for prompt, completion in zip(prompts, together, strict=True):
            alone = complete(generator, [prompt], **request)[0]
            assert (completion.text, completion.tokens) == (alone.text, alone.tokens)
            assert np.allclose(completion.logprobs, alone.logprobs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("framework", BACKENDS)
def test_finished_rows_cost_nothing(framework: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """15 of 16 rows end early; the batch then shrinks to the row that is left."""
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    prompts = [[1, 5 + i] for i in range(16)]
    whole = tokens_of(generator, prompts, max_new_tokens=64, temperature=0.0)
    survivor = max(range(16), key=lambda i: len(whole[i]))
    assert len(whole[survivor]) == 64
    stops = {token for i, row in enumerate(whole) if i != survivor for token in row[:8]} - set(whole[survivor])
    batches = []
    decode = type(generator)._decode

    def counted(self: Any, state: Any, seen: np.ndarray, *arguments: Any, **options: Any) -> Any:
        batches.append(len(seen))
        return decode(self, state, seen, *arguments, **options)

    monkeypatch.setattr(type(generator), "_decode", counted)
    stopped = tokens_of(generator, prompts, max_new_tokens=64, temperature=0.0, stop=sorted(stops))
    assert stopped[survivor] == whole[survivor]
    assert batches[0] == 16
    assert batches[-1] <= 4, batches
    assert sum(batches) < 2 * 16


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_prefix_can_be_continued_many_times(framework: str, float64: Tier, tokenizer: Tokenizer) -> None:
    """The same as the whole prompts at once, in any order, greedy and sampled; the prefix can be used again."""
    generator = generators(TINY, float64, tokenizer)[framework]
    for beginning in ([1], [1, *range(60, 99)]):
        prefix = generator.prefill(beginning)
        for suffixes in ([[7, 8], [9], list(range(200, 240))], [[9], [7], [8]]):
            for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "n": 2}):
                whole = complete(generator, [beginning + s for s in suffixes], max_new_tokens=46, **options)
                continued = complete(generator, suffixes, prefix=prefix, max_new_tokens=46, **options)
                assert [c.tokens for c in continued] == [c.tokens for c in whole]
                assert all(
                    np.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-12)
                    for a, b in zip(continued, whole, strict=True)
                )
    text = "".join(generator.stream([9], prefix=prefix, max_new_tokens=46, temperature=0.0))
    assert text == generator.generate([[*beginning, 9]], max_new_tokens=46, temperature=0.0)[0]
    assert tokens_of(generator, [""], prefix=prefix, max_new_tokens=47) == tokens_of(
        generator, [beginning], max_new_tokens=47
    )
    full = generator.prefill(list(range(4, 323)))  # all but one token of the context
    assert tokens_of(generator, [[]], prefix=full, max_new_tokens=1)
    with pytest.raises(InputError, match="longer than the context"):
        generator.generate([[5]], prefix=full, max_new_tokens=1)


@pytest.mark.parametrize("framework", BACKENDS)
def test_long_prompts_are_prefilled_in_chunks(
    framework: str, float64: Tier, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = generators(TINY, float64, tokenizer)[framework]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 512, n).tolist() for n in (300, 33, 64, 1)]
    whole = complete(generator, prompts, max_new_tokens=8, temperature=0.0)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 32)
    prefill, calls = generator._prefill, []
    monkeypatch.setattr(generator, "_prefill", lambda *arguments: calls.append(1) or prefill(*arguments))
    for completion, expected in zip(
        complete(generator, prompts, max_new_tokens=8, temperature=0.0), whole, strict=True
    ):
        assert completion.tokens == expected.tokens
        assert np.allclose(completion.logprobs, expected.logprobs, rtol=0, atol=1e-12)
    assert len(calls) == 10  # of 299 tokens, 32 at a time


@pytest.mark.extended
def test_one_compilation_per_bucket_and_batch_size(tokenizer: Tokenizer) -> None:
    """A new number of tokens, temperature or filter does not compile again; nor does a known bucket or batch size."""
    config = dataclasses.replace(TINY, rope_theta=12_345.0)  # unique to this test
    generator: Any = generators(config, TIERS["float32"], tokenizer)["jax"]
    prefill, decode = generator._run_prefill, generator._run_decode
    requests = [
        ([[1, 5]], 3, {}),
        ([[1, 6, 7]], 12, {"top_k": 5, "seed": 3, "repetition_penalty": 1.1}),
        ([[1] * 14], 2, {"temperature": 1, "top_p": 1}),
        ([[1, 5]], 90, {}),
        ([[1, 5]], 94, {"min_p": 0.1}),
        ([[1, 5], [1]], 90, {}),
        ([[1, 5], [1, 7], [9], [1, 7, 8]], 12, {}),
        ([[3, 4]] * 4, 13, {"n": 1}),
        ([[3, 4]], 13, {"n": 4}),
    ]
    for prompts, n_tokens, options in requests:
        generator.generate(prompts, max_new_tokens=n_tokens, **({"temperature": 0.9, "top_p": 0.9} | options))
    shapes = {
        (len(prompts) * options.get("n", 1), bucket(max(map(len, prompts)) + n, 320))
        for prompts, n, options in requests
    }
    assert shapes == {(1, 16), (1, 96), (2, 96), (4, 16)}
    assert decode._cache_size() <= len(shapes) + 2, "rows that end early may halve a batch: (1, 16) and (2, 16)"
    before = decode._cache_size(), prefill._cache_size()
    for prompts, n_tokens, _ in requests:
        generator.generate(prompts, max_new_tokens=n_tokens, temperature=0.3, top_k=9)
    assert (decode._cache_size(), prefill._cache_size()) == before


@pytest.mark.extended
@pytest.mark.parametrize("batch", [1, 4])
def test_cache_is_donated_and_never_copied(batch: int, tokenizer: Tokenizer) -> None:
    """The compiled loop writes into the cache that it was given, and copies neither the cache nor a weight."""
    generator: Any = generators(TINY, TIERS["float32"], tokenizer)["jax"]
    capacity = 80
    state = generator._new_state(batch, capacity)
    arguments = (
        np.zeros((batch, TINY.vocab_size), bool),
        np.zeros((batch, BLOCK), np.float32),
        np.ones(batch, bool),
        2,
        Filters.of([SamplingConfig()] * batch, TINY.vocab_size),
    )
    params = generator._one_row if batch == 1 else generator._several_rows
    run = generator._run_decode_one if batch == 1 else generator._run_decode
    program = run.lower(False, params, generator._rope, state, *arguments).compile().as_text()
    kernels = {array.shape for path, array in params.items() if path.endswith(".kernel")}
    kernels |= {shape[::-1] for shape in kernels}
    cache = state[1].layers[0].k_BKSH.shape
    assert (48, 96) in kernels
    inside = ""  # values inside a fusion are computed where they are needed and not stored
    for line in program.splitlines():
        inside = inside if line.startswith(" ") else line
        made, _, operation = line.partition(" = ")[2].partition(" ")
        for shape in () if inside.startswith(("%fused", "%wrapped")) else {*kernels, cache}:
            if made.startswith(f"f32[{','.join(map(str, shape))}]"):
                copies = ("copy(", "concatenate(", "slice(", *(["fusion("] if shape in kernels else []))
                assert not operation.startswith(copies), line
    old = state[1].layers[0].k_BKSH
    generator._decode(state, *arguments, greedy=False)
    assert old.is_deleted()


@pytest.mark.parametrize("name", ["gqa", "mha", "mqa-untied"])
def test_layouts_keep_the_weights(name: str, float64: Tier) -> None:
    """Both layouts hold every parameter bit for bit, and the head of a tied model is its embedding."""
    pair = make_pair(MODELS[name], float64)
    _, params, _ = split_model(pair.jax)
    one_row, several_rows = jax_generate.for_one_row(pair.config, params), jax_generate.with_head(pair.config, params)
    assert one_row.keys() == several_rows.keys() == params.keys() | {"lm_head.kernel"}
    for path, array in one_row.items():
        kernel = path.endswith(".kernel")
        assert np.array_equal(array.T if kernel else array, several_rows[path]), path
    for path, array in params.items():
        assert several_rows[path] is array, path
    if pair.config.tie_embeddings:
        assert one_row["lm_head.kernel"] is params["model.embed_tokens.embedding"]


@pytest.mark.parametrize("framework", BACKENDS)
def test_truncation(framework: str, tokenizer: Tokenizer) -> None:
    """With `truncate`, as much of the end of the prompt is kept as fits."""
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    ids = (np.arange(500) % 400 + 4).tolist()
    cut = tokens_of(generator, [ids, [5]], max_new_tokens=20, temperature=0.0, truncate=True)
    assert cut == tokens_of(generator, [ids[-300:], [5]], max_new_tokens=20, temperature=0.0)


def test_buckets() -> None:
    assert [bucket(n, 1 << 20) for n in (1, 16, 17, 24, 25, 33, 48, 49, 65, 97)] == [
        16,
        16,
        24,
        24,
        32,
        48,
        48,
        64,
        96,
        128,
    ]
    assert bucket(300, 310) == 310
    assert [generation._batch_size(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17)] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert all(n <= bucket(n, 1 << 20) <= max(16, 1.5 * n) for n in range(1, 3000))
