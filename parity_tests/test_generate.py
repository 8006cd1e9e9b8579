"""The decoding contract: one request, the same tokens from both frameworks, and each row as if it were alone."""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm_jax
import minillm_torch
from minillm_core import generation
from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.generation import BLOCK, BaseGenerator, Completion, Prefix, bucket, shown
from minillm_core.tokenizer import Tokenizer
from minillm_jax import generate as jax_generate
from minillm_jax.weights import split_model
from parity_tests.conftest import (
    MODELS,
    TIERS,
    TINY,
    Pair,
    Tier,
    make_pair,
    pair_of,
    random_weights,
    to_numpy,
    to_torch,
)
from parity_tests.test_transformers import load_llama

BACKENDS = {"jax": minillm_jax, "torch": minillm_torch}
PROMPTS = [[1, 40, 41, 42, 43], [1], [1, *range(100, 117)]]


def generators(config: ModelConfig, tier: Tier, tokenizer: Tokenizer) -> dict[str, BaseGenerator]:
    pair = make_pair(config, tier)
    return {name: BACKENDS[name].Generator(getattr(pair, name), tokenizer) for name in BACKENDS}


def complete(generator: BaseGenerator, prompts: Any, **options: Any) -> list[Completion]:
    return generator.generate(prompts, logprobs=True, **options)


def tokens_of(generator: BaseGenerator, prompts: Any, **options: Any) -> list[list[int]]:
    return [completion.tokens for completion in complete(generator, prompts, **options)]


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa-untied", "gqa-wide-heads-untied"])
def test_greedy_tokens_agree(name: str, tokenizer: Tokenizer, tmp_path: Any) -> None:
    """200 tokens in float32, in both frameworks and in transformers, for rows of different length."""
    config = dataclasses.replace(MODELS[name], vocab_size=512)
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


def test_penalised_greedy_tokens_are_those_of_transformers(tokenizer: Tokenizer, tmp_path: Any) -> None:
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


def test_a_thousand_continuations(float64: Tier, tokenizer: Tokenizer) -> None:
    """In float64 without exception: 1,000 sampled continuations, over many options and lengths."""
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
    """Sampling written out, without cache, padding or blocks: a Philox number per (seed, prompt, sample, position)."""
    key = generation.row_key(prompt, sample)
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
def test_tokens_are_those_of_a_plain_loop(penalty: float, float64: Tier, tokenizer: Tokenizer) -> None:
    """Both frameworks could draw the same wrong numbers; a loop without their machinery cannot."""
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
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    options=st.sampled_from([{"temperature": 0.0}, *OPTIONS]),
)
@pytest.mark.parametrize("framework", BACKENDS)
def test_each_row_is_its_prompt_alone(
    framework: str, tokenizer: Tokenizer, lengths: list[int], seed: int, options: dict[str, Any]
) -> None:
    """Tokens exactly, log-probabilities to 1e-12, whatever the neighbours; some rows end early, the batch shrinks."""
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
    """Of 16 rows 15 end within the first block: from then on one row is decoded."""
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    prompts = [[1, 5 + i] for i in range(16)]
    whole = tokens_of(generator, prompts, max_new_tokens=64, temperature=0.0)
    survivor = max(range(16), key=lambda i: len(whole[i]))
    assert len(whole[survivor]) == 64
    stops = {token for i, row in enumerate(whole) if i != survivor for token in row[:8]} - set(whole[survivor])
    batches = []
    decode = type(generator)._decode

    def counted(self: Any, state: Any, seen: np.ndarray, noise: np.ndarray, n: int, sampling: Any) -> Any:
        batches.append(len(noise))
        return decode(self, state, seen, noise, n, sampling)

    monkeypatch.setattr(type(generator), "_decode", counted)
    stopped = tokens_of(generator, prompts, max_new_tokens=64, temperature=0.0, stop=sorted(stops))
    assert stopped[survivor] == whole[survivor]
    assert batches[0] == 16
    assert batches[-1] <= 4, batches
    assert sum(batches) < 2 * 16


@pytest.mark.parametrize("framework", BACKENDS)
def test_a_prefix_is_continued_many_times(framework: str, float64: Tier, tokenizer: Tokenizer) -> None:
    """The same as the whole prompts at once, in any order, greedy and sampled; the prefix is not used up."""
    generator = generators(TINY, float64, tokenizer)[framework]
    for beginning in ([1], [1, *range(60, 99)]):
        prefix = generator.prefill(beginning)
        for suffixes in ([[7, 8], [9], list(range(200, 240))], [[9], [7], [8]]):
            for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "n": 2}):
                whole = complete(generator, [beginning + s for s in suffixes], max_new_tokens=20, **options)
                continued = complete(generator, suffixes, prefix=prefix, max_new_tokens=20, **options)
                assert [c.tokens for c in continued] == [c.tokens for c in whole]
                assert all(
                    np.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-12)
                    for a, b in zip(continued, whole, strict=True)
                )
    text = "".join(generator.stream([9], prefix=prefix, max_new_tokens=20, temperature=0.0))
    assert text == generator.generate([[*beginning, 9]], max_new_tokens=20, temperature=0.0)[0]
    assert tokens_of(generator, [""], prefix=prefix, max_new_tokens=9) == tokens_of(
        generator, [beginning], max_new_tokens=9
    )
    full = generator.prefill(list(range(4, 323)))  # all but one token of the context
    assert tokens_of(generator, [[]], prefix=full, max_new_tokens=1)
    with pytest.raises(InputError, match="longer than the context"):
        generator.generate([[5]], prefix=full, max_new_tokens=1)


@pytest.mark.parametrize("framework", BACKENDS)
def test_long_prompts_go_in_chunks(
    framework: str, float64: Tier, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = generators(TINY, float64, tokenizer)[framework]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 512, n).tolist() for n in (300, 33, 64, 1)]
    whole = complete(generator, prompts, max_new_tokens=8, temperature=0.0)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 32)
    for completion, expected in zip(
        complete(generator, prompts, max_new_tokens=8, temperature=0.0), whole, strict=True
    ):
        assert completion.tokens == expected.tokens
        assert np.allclose(completion.logprobs, expected.logprobs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("framework", BACKENDS)
def test_scores(framework: str, float64: Tier, tokenizer: Tokenizer) -> None:
    """Those of the uncached model, of generation's own log-probabilities, and of any batch."""
    pair, generator = make_pair(TINY, float64), generators(TINY, float64, tokenizer)[framework]
    texts = ["The Congress of the United States", "a", "My fellow citizens, " * 8, "\u20ac and \U0001f600"]
    scores = generator.score(texts)
    for text, score in zip(texts, scores, strict=True):
        ids = tokenizer.encode(text, bos=True)
        assert len(score) == len(ids) - 1
        logits = pair.logits(np.array([ids[:-1]]))[1][0]
        expected = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[range(len(ids) - 1), ids[1:]]
        assert np.abs(score - expected).max() <= 1e-12
    changed = {"temperature": 1.7, "top_k": 30, "repetition_penalty": 1.4}  # log-probabilities are the model's own
    completion = complete(generator, [PROMPTS[2]], max_new_tokens=30, **changed)[0]
    score = generator.score([PROMPTS[2] + completion.tokens])[0]
    assert np.allclose(score[len(PROMPTS[2]) - 1 :], completion.logprobs, rtol=0, atol=1e-12)
    longest = np.arange(321) % 500 + 4
    assert len(generator.score([longest])[0]) == 320
    refused = ((["x" * 4000], "longer than the context"), ([""], "empty"), ([], "at least one"), ([[3]], "two"))
    for bad, message in refused:
        with pytest.raises(InputError, match=message):
            generator.score(bad)


def test_scores_agree(tier: Tier, tokenizer: Tokenizer) -> None:
    both = generators(TINY, tier, tokenizer)
    texts = ["The Congress", "of the United States of America"]
    for ours, theirs in zip(both["jax"].score(texts), both["torch"].score(texts), strict=True):
        assert np.abs(ours - theirs).max() <= tier.logits


def test_one_compilation_per_bucket_and_batch_size(tokenizer: Tokenizer) -> None:
    """For any number of tokens, temperature and filter; none for a prompt length or a number of rows seen before."""
    config = dataclasses.replace(TINY, rope_theta=12_345.0)  # nobody else's
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


@pytest.mark.parametrize("batch", [1, 4])
def test_the_cache_is_donated_and_never_copied(batch: int, tokenizer: Tokenizer) -> None:
    """The compiled loop writes into the cache it was given, and copies neither it nor a weight on the way."""
    generator: Any = generators(TINY, TIERS["float32"], tokenizer)["jax"]
    capacity = 80
    state = generator._new_state(batch, capacity)
    arguments = (
        np.zeros((batch, TINY.vocab_size), bool),
        np.zeros((batch, BLOCK), np.float32),
        2,
        jax_generate.filters_of(generation.SamplingConfig(), TINY.vocab_size),
    )
    params = generator._one_row if batch == 1 else generator._several_rows
    program = generator._run_decode.lower(False, params, generator._rope, state, *arguments).compile().as_text()
    kernels = {array.shape for path, array in params.items() if path.endswith(".kernel")}
    kernels |= {shape[::-1] for shape in kernels}
    cache = state[1].layers[0].k_BKSH.shape
    assert (48, 96) in kernels
    inside = ""  # what is inside a fusion is computed where it is needed, and not stored
    for line in program.splitlines():
        inside = inside if line.startswith(" ") else line
        made, _, operation = line.partition(" = ")[2].partition(" ")
        for shape in () if inside.startswith(("%fused", "%wrapped")) else {*kernels, cache}:
            if made.startswith(f"f32[{','.join(map(str, shape))}]"):
                copies = ("copy(", "concatenate(", "slice(", *(["fusion("] if shape in kernels else []))
                assert not operation.startswith(copies), line
    old = state[1].layers[0].k_BKSH
    generator._decode(state, *arguments[:3], generation.SamplingConfig())
    assert old.is_deleted()


@pytest.mark.parametrize("name", ["gqa", "mha", "mqa-untied"])
def test_the_layout_for_the_cpu_is_the_same_model(name: str, float64: Tier) -> None:
    """Every parameter is there, to the bit, and the head of a tied model is its embedding."""
    pair = make_pair(MODELS[name], float64)
    _, params, _ = split_model(pair.jax)
    _, one_row, several_rows = jax_generate._laid_out_for_cpu(pair.config, params, float64.jax)
    assert one_row.keys() == several_rows.keys() == params.keys() | {"lm_head.kernel"}
    for path, array in one_row.items():
        kernel = path.endswith(".kernel")
        assert np.array_equal(array.T if kernel else array, several_rows[path]), path
    for path, array in params.items():
        assert several_rows[path] is array, path
    if pair.config.tie_embeddings:
        assert one_row["lm_head.kernel"] is params["model.embed_tokens.embedding"]


STOPS: list[dict[str, Any]] = [{}, {"stop": "e"}, {"stop": ["the", "an", " "]}, {"stop": ["nothing like it"]}]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("framework", BACKENDS)
def test_stream_is_generate(framework: str, stop: dict[str, Any], tokenizer: Tokenizer) -> None:
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    for seed in range(4):
        request = {"max_new_tokens": 60, "temperature": 1.5, "top_p": 1.0, "seed": seed} | stop
        pieces = list(generator.stream("The Congress", **request))
        assert all(pieces)
        completion = complete(generator, ["The Congress"], **request)[0]
        assert "".join(pieces) == completion.text
        stops = [stop["stop"]] if isinstance(stop.get("stop"), str) else stop.get("stop", [])
        assert not any(s in completion.text for s in stops)
        free = complete(generator, ["The Congress"], **(request | {"stop": ()}))[0]
        assert free.text.startswith(completion.text)
        assert free.tokens[: len(completion.tokens)] == completion.tokens
        if any(s in free.text for s in stops):
            assert completion.finish_reason == "stop"
            assert any(free.text[len(completion.text) :].startswith(s) for s in stops)
        elif completion.finish_reason == "length":
            assert len(completion.tokens) == 60


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_shown_never_breaks(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any token ids, bytes of half characters among them, arriving in any pieces: what is shown only grows, never has a
    part of a character or of a stop string, and in the end is the whole text up to the first stop."""
    byte = st.sampled_from([tokenizer.encode("\u20ac\U0001f600\u0416")[i] for i in range(1, 5)])
    text = st.text("ab \n\u20ac\U0001f600\u4e2d", max_size=12).map(tokenizer.encode)
    ids = [i for part in data.draw(st.lists(st.one_of(text, st.lists(byte, max_size=3)), max_size=6)) for i in part]
    stop = data.draw(st.lists(st.text("ab \u20ac", min_size=1, max_size=3), max_size=2))
    whole = tokenizer.decode(ids).rstrip("\ufffd")
    sent = ""
    for n in range(len(ids) + 1):
        ended = n == len(ids)
        so_far = tokenizer.decode(ids[:n]).rstrip("\ufffd")  # as BaseGenerator._text
        now = shown(so_far, stop, ended)
        assert now.startswith(sent), (now, sent)
        assert not any(s in now for s in stop)
        if any(s in so_far for s in stop):
            break
        sent = now
    else:
        assert sent == whole


def test_characters_split_over_tokens(tokenizer: Tokenizer) -> None:
    """Bytes of a character that the tokenizer has no piece for; spaces; a stop string in three tokens."""
    ids = tokenizer.encode("say \U0001f600 and  two spaces")
    assert len(tokenizer.encode("\U0001f600")) >= 4
    generator = generators(TINY, TIERS["float32"], tokenizer)["torch"]
    steps = [generator._text(ids[:n]) for n in range(len(ids) + 1)]
    assert steps[-1] == "say \U0001f600 and  two spaces"
    assert all("\ufffd" not in step for step in steps)
    parts = ["some", "some t", "some th", "some the", "some the e", "some the en", "some the end."]
    assert [shown(part, ["the end"], False) for part in parts] == [
        "some",
        "some ",
        "some ",
        "some ",
        "some ",
        "some ",
        "some ",
    ]
    assert shown("some the e", ["the end"], True) == "some the e"


@pytest.mark.parametrize("framework", BACKENDS)
def test_stops_at_the_end_of_the_document(framework: str, tokenizer: Tokenizer) -> None:
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    whole = complete(generator, [[1, 9]], max_new_tokens=60, temperature=1.0)[0]
    end = whole.tokens[33]
    stopped = complete(generator, [[1, 9]], max_new_tokens=60, temperature=1.0, stop=[end])[0]
    generator.tokenizer = Tokenizer(tokenizer.path)
    generator.tokenizer.end_ids = frozenset([end])
    ended = complete(generator, [[1, 9]], max_new_tokens=60, temperature=1.0)[0]
    assert stopped == ended
    assert ended.tokens == whole.tokens[: whole.tokens.index(end)]
    assert ended.finish_reason == "stop"
    streamed = "".join(generator.stream([1, 9], max_new_tokens=60, temperature=1.0))
    assert streamed == ended.text


@pytest.mark.parametrize("framework", BACKENDS)
def test_truncation(framework: str, tokenizer: Tokenizer) -> None:
    """Asked for, the end of the prompt is kept, as much of it as fits."""
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    ids = (np.arange(500) % 400 + 4).tolist()
    cut = tokens_of(generator, [ids, [5]], max_new_tokens=20, temperature=0.0, truncate=True)
    assert cut == tokens_of(generator, [ids[-300:], [5]], max_new_tokens=20, temperature=0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("framework", BACKENDS)
def test_torch_compile_gives_the_same_tokens(framework: str, tokenizer: Tokenizer) -> None:
    if framework == "jax":
        with pytest.raises(TypeError):
            minillm_jax.Generator(make_pair(TINY, TIERS["float32"]).jax, tokenizer, compile=True)
        return
    model = make_pair(TINY, TIERS["float32"]).torch
    plain, compiled = (minillm_torch.Generator(model, tokenizer, compile=on) for on in (False, True))
    request = {"max_new_tokens": 20, "temperature": 1.0, "seed": 2}
    assert tokens_of(compiled, PROMPTS, **request) == tokens_of(plain, PROMPTS, **request)


def broken(tier: Tier) -> Pair:
    """A model with one weight that is not a number."""
    weights = {name: array.copy() for name, array in random_weights(TINY).items()}
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    return pair_of(TINY, tier, weights)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(framework: str, temperature: float, tokenizer: Tokenizer) -> None:
    generator = BACKENDS[framework].Generator(getattr(broken(TIERS["float32"]), framework), tokenizer)
    with pytest.raises(InputError, match=r"(?s)logits are not finite.*new token 1.*checkpoint"):
        generator.generate([[1, 5], [1]], max_new_tokens=3, temperature=temperature)
    with pytest.raises(InputError, match="logits are not finite"):
        list(generator.stream([1, 5], max_new_tokens=3, temperature=temperature))
    with pytest.raises(InputError, match="logits are not finite"):
        generator.score([[1, 5]])


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda g: g.generate([], max_new_tokens=3), "at least one text"),
        (lambda g: g.generate("a text, not a list", max_new_tokens=3), "a list"),
        (lambda g: g.generate([[]], max_new_tokens=3), "empty prompt"),
        (lambda g: g.generate(["a", ""], max_new_tokens=3), r"(?s)empty prompt.*prompt 2"),
        (lambda g: g.stream("", max_new_tokens=3), "empty prompt"),
        (lambda g: g.generate([[1, 512]], max_new_tokens=3), "outside the vocabulary"),
        (lambda g: g.generate([[1], [-1]], max_new_tokens=3), r"(?s)outside the vocabulary.*prompt 2"),
        (lambda g: g.generate(["a"], max_new_tokens=0), "max_new_tokens"),
        (lambda g: g.generate(["a"], max_new_tokens=2.5), "max_new_tokens is not a whole number"),
        (lambda g: g.generate(["a"], max_new_tokens=3, n=0), "n is out of range"),
        (lambda g: g.generate(["word " * 400], max_new_tokens=3), "longer than the context"),
        (lambda g: g.generate(["word " * 400], max_new_tokens=320, truncate=True), "longer than the context"),
        (lambda g: g.generate(["a"], max_new_tokens=319), "at most 318 new tokens"),
        (lambda g: g.generate(["a"], max_new_tokens=3, temperature=-1.0), "temperature"),
        (lambda g: g.generate(["a"], max_new_tokens=3, top_p=0.0), "top_p"),
        (lambda g: g.generate(["a"], max_new_tokens=3, top_k=-1), "top_k"),
        (lambda g: g.generate(["a"], max_new_tokens=3, stop=""), "stop string is empty"),
        (lambda g: g.generate(["a"], max_new_tokens=3, stop=None), "not a whole number"),
        (lambda g: g.generate([1, 5], max_new_tokens=3), "not a prompt"),
        (lambda g: g.generate([[1.5, 2.5]], max_new_tokens=3), "not a whole number"),
        (lambda g: g.generate(None, max_new_tokens=3), "a list"),
        (lambda g: g.generate(["\ud800"], max_new_tokens=3), "not Unicode"),
        (lambda g: g.generate(["a"], max_new_tokens=3, seed=3.0), "seed is not a whole number"),
        (lambda g: g.generate(["a"], max_new_tokens=3, temperature="1"), "temperature is out of range"),
        (lambda g: g.generate(["a"], max_new_tokens=3, repetition_penalty=1e-30), "repetition_penalty"),
        (lambda g: g.generate(["a"], max_new_tokens=3, stop=["b", ""]), "stop string is empty"),
        (lambda g: g.generate(["a"], max_new_tokens=3, stop=[512]), "outside the vocabulary"),
        (lambda g: g.generate(["a"], max_new_tokens=3, prefix="the beginning"), "not a prefix"),
        (lambda g: g.generate([5], max_new_tokens=3, prefix=Prefix((1,), None, g)), "not a prompt"),
        (lambda g: g.prefill(""), "empty prompt"),
        (lambda g: g.prefill("word " * 400), "longer than the context"),
    ],
)
def test_bad_requests(
    framework: str,
    request_of: Callable[[BaseGenerator], Any],
    message: str,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clear error before any work; for a stream at the call."""
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    for work in ("_new_state", "_prefill", "_decode", "_losses"):
        monkeypatch.setattr(generator, work, functools.partial(pytest.fail, "work was begun"))
    with pytest.raises(InputError, match=message):
        request_of(generator)


def test_numbers_of_numpy(tokenizer: Tokenizer) -> None:
    for generator in generators(TINY, TIERS["float32"], tokenizer).values():
        plain = generator.generate([[1, 5]], max_new_tokens=9, seed=3, top_k=5, temperature=1)
        numbers = {
            "max_new_tokens": np.int8(9),
            "seed": np.int64(3),
            "top_k": np.uint8(5),
            "temperature": np.float32(1),
        }
        assert generator.generate([np.array([1, 5])], n=np.int64(1), **numbers) == plain


def test_tokenizer_of_another_vocabulary(tokenizer: Tokenizer) -> None:
    pair: Pair = make_pair(MODELS["gqa"], TIERS["float32"])
    for name, backend in BACKENDS.items():
        with pytest.raises(InputError, match=r"(?s)another vocabulary.*509 pieces.*512 pieces"):
            backend.Generator(getattr(pair, name), tokenizer)


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
