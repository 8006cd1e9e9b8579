"""Bad requests are refused before any work, and broken models give an error: the message says what is wrong."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minillm_core.decoding.generation import BaseGenerator, Prefix
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.conftest import (
    BACKENDS,
    MODELS,
    TIERS,
    TINY,
    Pair,
    Tier,
    make_pair,
    pair_of,
    random_weights,
)
from parity_tests.test_generate import generators


def broken(tier: Tier) -> Pair:
    """Both models, with one weight set to NaN."""
    weights = {name: array.copy() for name, array in random_weights(TINY).items()}
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    return pair_of(TINY, tier, weights)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nonfinite_logits_are_refused(framework: str, temperature: float, tokenizer: Tokenizer) -> None:
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
        (lambda g: g.generate(["a"], max_new_tokens=600), r"what to do: ask for at most 318 new tokens$"),
        (
            lambda g: g.generate(["a"], max_new_tokens=3, temperture=1.0),
            r"(?s)unknown.*did you mean temperature",
        ),
        (lambda g: g.stream(["a", "b"], max_new_tokens=3), "stream takes one prompt"),
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
    """A clear error before any work starts; for a stream, at the call itself."""
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    for work in ("_new_state", "_prefill", "_decode", "_losses"):
        monkeypatch.setattr(generator, work, functools.partial(pytest.fail, "work was started"))
    with pytest.raises(InputError, match=message):
        request_of(generator)


def test_numpy_numbers_are_accepted(tokenizer: Tokenizer) -> None:
    for generator in generators(TINY, TIERS["float32"], tokenizer).values():
        plain = generator.generate([[1, 5]], max_new_tokens=9, seed=3, top_k=5, temperature=1)
        numbers = {
            "max_new_tokens": np.int8(9),
            "seed": np.int64(3),
            "top_k": np.uint8(5),
            "temperature": np.float32(1),
        }
        assert generator.generate([np.array([1, 5])], n=np.int64(1), **numbers) == plain


def test_tokenizer_with_mismatched_vocabulary(tokenizer: Tokenizer) -> None:
    pair: Pair = make_pair(MODELS["gqa"], TIERS["float32"])
    for name, backend in BACKENDS.items():
        with pytest.raises(InputError, match=r"(?s)vocabulary is larger.*509 pieces.*512 pieces"):
            backend.Generator(getattr(pair, name), tokenizer)
