"""Streams show whole characters and no part of a stop string, and end with the text that `generate` returns."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_core.decoding.generation import shown
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.conftest import (
    BACKENDS,
    TIERS,
    TINY,
)
from parity_tests.test_generate import complete, generators

pytestmark = pytest.mark.extended

STOPS: list[dict[str, Any]] = [{}, {"stop": "e"}, {"stop": ["the", "an", " "]}, {"stop": ["nothing like it"]}]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("framework", BACKENDS)
def test_stream_equals_generate(framework: str, stop: dict[str, Any], tokenizer: Tokenizer) -> None:
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
def test_streamed_text_only_grows(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """For any token ids, including bytes of incomplete characters: the shown text only grows, never has a part of a
    character or a stop string, and ends as the whole text up to the first stop string."""
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


@settings(max_examples=500, deadline=None)
@given(text=st.text("ab", max_size=9), stop=st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_what_may_become_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    """The longest suffix of the text that a stop string begins with, and nothing else."""
    if any(s in text for s in stop):
        return
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    assert shown(text, stop, False) == text[: len(text) - held]


def test_long_stop_strings_cost_little() -> None:
    """A server decodes for nobody else meanwhile; comparing each of their beginnings would take a minute."""
    for stop in ("x" * 200_000, "a" * 200_000, ("a" * 50 + "b") * 4000):
        started = time.monotonic()
        assert shown("ab" * 2000 + "a" * 3000, [stop] * 16, False)
        assert time.monotonic() - started < 2


def test_characters_split_over_tokens(tokenizer: Tokenizer) -> None:
    """A character that has no piece of its own, as bytes; spaces; a stop string that arrives in parts."""
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
