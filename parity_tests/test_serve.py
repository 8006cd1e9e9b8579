"""OpenAI's API of `minillm serve`, used with OpenAI's own client: the answers are those of `generate` and `score`."""

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from transformers import AutoTokenizer

from minillm_core.decoding.generation import BaseGenerator
from minillm_core.decoding.scheduler import Update
from minillm_core.serving.playground_routes import _Difference, _Side
from minillm_core.text.tokenizer_json import load_tokenizer
from parity_tests.conftest import BACKENDS
from parity_tests.server import CONFIG, Server, make_run, serving

pytestmark = pytest.mark.extended

MODELS = ("tiny-jax", "tiny-torch")
PROMPT = "The Congress of the United"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("serve"), corpus)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with serving(run, "--backend", "both", "--max-batch", "4") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def generator(run: Path) -> BaseGenerator:
    (checkpoint,) = (run / "torch" / "checkpoints").iterdir()
    return BACKENDS["torch"].Generator(BACKENDS["torch"].load(run), load_tokenizer(checkpoint, CONFIG.vocab_size))


def test_models(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [*MODELS]
    assert client.models.retrieve("tiny-jax").id == "tiny-jax"
    assert server.client.get("/health").json() == {"status": "ready"}


@pytest.mark.parametrize("model", MODELS)
def test_completions(model: str, client: openai.OpenAI, generator: BaseGenerator) -> None:
    """Texts and token ids, several prompts, several samples, every option: what `generate` gives with this seed."""
    options: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "seed": 7}
    extra: dict[str, Any] = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2}
    prompts: list[Any] = [PROMPT, "We", generator.tokenizer.encode("the people of")]
    for given in (prompts[:2], prompts[2], [prompts[2], [5]], prompts[0]):
        asked = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        expected = generator.generate(asked, max_new_tokens=20, n=2, stop=["e "], logprobs=True, **options, **extra)
        answer = client.completions.create(
            model=model, prompt=given, max_tokens=20, n=2, stop="e ", **options, extra_body=extra
        )
        assert [choice.text for choice in answer.choices] == [completion.text for completion in expected]
        assert [choice.finish_reason for choice in answer.choices] == [c.finish_reason for c in expected]
        assert [choice.index for choice in answer.choices] == [*range(len(expected))]
        assert answer.usage is not None
        n_prompt = sum(
            len(ids if isinstance(ids, list) else generator.tokenizer.encode(ids, bos=True)) for ids in asked
        )
        assert answer.usage.prompt_tokens == n_prompt
        assert 0 <= answer.usage.completion_tokens - sum(len(c.tokens) for c in expected) <= len(expected)


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_the_answer_in_parts(model: str, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": model, "prompt": [PROMPT, "We"], "n": 2, "max_tokens": 30, "seed": 3}
    for more in ({}, {"logprobs": 2}, {"logprobs": 0, "echo": True}, {"echo": True}, {"stop": ["e", "th"]}):
        whole = client.completions.create(**options, **more)
        parts = [*client.completions.create(**options, **more, stream=True, stream_options={"include_usage": True})]
        assert parts[-1].usage == whole.usage
        assert not parts[-1].choices
        assert len(parts) > len(whole.choices)
        for choice in whole.choices:
            pieces = [c for part in parts for c in part.choices if c.index == choice.index]
            assert "".join(piece.text for piece in pieces) == choice.text
            assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [choice.finish_reason]
            if choice.logprobs is None:
                assert all(piece.logprobs is None for piece in pieces)
                continue
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [item for piece in pieces for item in getattr(piece.logprobs, name)]
                assert joined == getattr(choice.logprobs, name), name


@pytest.mark.parametrize("model", MODELS)
def test_log_probabilities_of_prompt_and_answer(model: str, client: openai.OpenAI, generator: BaseGenerator) -> None:
    """With `echo`, those of `score`, prompts of any length included; the first token has none. The top tokens contain
    the chosen one, and are no less likely. Offsets are places in the text."""
    ids = generator.tokenizer.encode(PROMPT * 12)[:300]
    for prompt, max_tokens in ((ids, 0), (ids[:3], 1), (ids[:140], 5), (PROMPT, 12)):
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=3, temperature=0
        )
        (choice,) = answer.choices
        found: Any = choice.logprobs
        given = generator.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(found.tokens) - len(given)
        scores = generator.score([given])[0]
        assert found.token_logprobs[0] is None
        assert np.allclose(found.token_logprobs[1 : len(given)], scores, rtol=0, atol=2e-5)
        assert found.top_logprobs[0] is None
        for token, logprob, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
            assert 3 <= len(top) <= 4
            assert top[token] == logprob, "programs compare the two, to tell whether a token is the most likely one"
            assert max(top.values()) >= logprob
            assert sum(map(math.exp, top.values())) <= 1 + 1e-6
        text = generator.tokenizer.decode(given)
        assert choice.text.startswith(text)
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            if token in generator.tokenizer.decode_after([generator.tokenizer.encode(token)[0]]):
                assert choice.text[offset:].startswith(token), (token, offset)


def test_an_end_token_has_a_log_probability(client: openai.OpenAI, generator: BaseGenerator) -> None:
    """Programs that score a text ask for one token after it and leave out the last number, whatever that token is."""
    likely = generator.generate([[1, 5]], max_new_tokens=1, temperature=0.0, logprobs=True)[0].tokens[0]
    for stops in ([], [likely]):
        answer = client.completions.create(
            model="tiny-torch",
            prompt=[1, 5],
            max_tokens=1,
            echo=True,
            logprobs=1,
            temperature=0,
            extra_body={"stop_token_ids": stops},
        )
        found: Any = answer.choices[0].logprobs
        assert len(found.token_logprobs) == 3
        assert answer.choices[0].finish_reason == ("stop" if stops else "length")


@pytest.mark.parametrize("model", MODELS)
def test_chat(model: str, client: openai.OpenAI, generator: BaseGenerator, run: Path) -> None:
    """The prompt has the ids of transformers; a reply ends at the template's token; a stream has the same text."""
    auto = AutoTokenizer.from_pretrained(run.parent / "hf")
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a law?"}]},
        {"role": "assistant", "content": "A rule."},
        {"role": "user", "content": "Who makes it?"},
    ]
    plain = [*messages]
    plain[1] = {"role": "user", "content": "What is a law?"}
    ids = auto.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    stop = auto.convert_tokens_to_ids("<|im_end|>")
    expected = generator.generate(
        [ids], max_new_tokens=30, n=2, stop=stop, seed=5, temperature=1.0, top_p=1.0, logprobs=True
    )
    options: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": 30, "n": 2, "seed": 5}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    for choice, completion in zip(answer.choices, expected, strict=True):
        assert (choice.message.content, choice.message.role) == (completion.text, "assistant")
        content: Any = choice.logprobs and choice.logprobs.content
        shown = [item.logprob for item in content][: len(completion.tokens)]
        assert np.allclose(shown, completion.logprobs, rtol=0, atol=2e-5)
        for item in content:
            assert len(item.top_logprobs) == 2
            assert {top.logprob for top in item.top_logprobs if top.token == item.token} <= {item.logprob}
            assert item.bytes is None or bytes(item.bytes).decode() == item.token or item.bytes == []
    parts = [*client.chat.completions.create(**options, stream=True)]
    for choice in answer.choices:
        deltas = [c.delta for part in parts for c in part.choices if c.index == choice.index]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    default = client.chat.completions.create(model=model, messages=messages, seed=5)
    assert default.choices[0].finish_reason in ("stop", "length")


def test_a_reply_is_part_of_the_next_request(client: openai.OpenAI) -> None:
    """As the client's own object, and as all fields of it."""
    messages: list[Any] = [{"role": "user", "content": "What is a law?"}]
    options: dict[str, Any] = {"model": "tiny-torch", "max_tokens": 5, "seed": 1}
    reply = client.chat.completions.create(messages=messages, **options).choices[0].message
    plain = {"role": "assistant", "content": reply.content}
    answers = [
        client.chat.completions.create(messages=[*messages, said, *messages], **options)
        for said in (plain, reply, reply.model_dump())
    ]
    assert (
        len({(answer.choices[0].message.content, answer.usage and answer.usage.prompt_tokens) for answer in answers})
        == 1
    )


def test_missing_options_are_those_of_openai(client: openai.OpenAI, generator: BaseGenerator) -> None:
    """16 tokens at temperature 1 without filters; without a seed, a different answer every time."""
    answers = [client.completions.create(model="tiny-torch", prompt=PROMPT).choices[0].text for _ in range(4)]
    assert len({*answers}) > 1
    seeded = client.completions.create(model="tiny-torch", prompt=PROMPT, seed=9).choices[0].text
    assert [seeded] == generator.generate([PROMPT], max_new_tokens=16, temperature=1.0, top_p=1.0, seed=9)


def test_what_runs_beside_a_request_does_not_change_it(server: Server) -> None:
    """60 requests at once, a third of which hang up: every answer is the one that the request gets alone."""
    bodies = [
        {
            "model": MODELS[i % 2],
            "prompt": [5 + i % 20],
            "max_tokens": 1 + i % 40,
            "seed": i % 20,
            "logprobs": i % 3 or None,
        }
        for i in range(60)
    ]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=120) as client:

            async def ask(i: int, body: Any) -> str:
                if i % 3:
                    return (await client.completions.create(**body)).choices[0].model_dump_json()
                stream = await client.completions.create(**body | {"max_tokens": 300}, stream=True)
                async for _ in stream:
                    await stream.close()
                    break
                return ""

            return [*await asyncio.gather(*(ask(i, body) for i, body in enumerate(bodies)))]

    together = asyncio.run(ask_all())
    for body, answer in zip(bodies, together, strict=True):
        if answer:
            alone = server.client.post("/v1/completions", json=body).json()["choices"][0]
            assert json.loads(answer) == alone
    for _ in range(100):
        if not server.metric("minillm_running") + server.metric("minillm_waiting"):
            break
    assert server.metric("minillm_running") == 0, "requests of clients that hung up still run"


def test_metrics(server: Server) -> None:
    before = server.metric("minillm_generated_tokens_total")
    server.post(prompt=[1, 5], max_tokens=7, stop_token_ids=[])
    assert 1 <= server.metric("minillm_generated_tokens_total") - before <= 7
    assert server.metric("minillm_first_token_seconds_count") > 0
    assert server.metric("minillm_responses_total") > 3


def test_playground(server: Server, generator: BaseGenerator) -> None:
    """Both sides stream the same tokens, and their logits agree to float32."""
    described = server.client.get("/playground/models").json()
    body = described["defaults"] | {"prompt": PROMPT, "max_tokens": 40, "stop": []}
    answer = server.post("/playground/generate", **body)
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    expected = generator.generate([PROMPT], max_new_tokens=40)[0]
    for model in MODELS:
        tokens = [event for event in events if event["type"] == "token" and event["model"] == model]
        assert "".join(event["text"] for event in tokens).rstrip("\ufffd") == expected
        assert [event["index"] for event in tokens] == [*range(len(tokens))]
        assert all(len(event["alternatives"]) == 10 for event in tokens)
        assert {event["finish_reason"] for event in events if event["type"] == "done"} <= {"stop", "length"}
    differences = [event for event in events if event["type"] == "difference"]
    assert differences[-1]["tokens"] >= len(tokens)
    assert 0 < differences[-1]["logits"] <= 5e-5
    assert [d["logits"] for d in differences] == sorted(d["logits"] for d in differences)


@pytest.mark.parametrize("ends", [False, True])
def test_the_playground_keeps_no_logits_after_a_difference(ends: bool, generator: BaseGenerator) -> None:
    """One side takes a different token, or ends: nothing is compared from there on, however long the other one is."""
    model: Any = SimpleNamespace(id="tiny", tokenizer=generator.tokenizer, texts={5: "a", 6: "b"})
    answers: Any = None
    sides = [_Side(model, answers) for _ in range(2)]
    difference, found = _Difference(sides), []
    logits_V = np.zeros(CONFIG.vocab_size, np.float32)
    for i in range(20):
        for n, side in enumerate(sides):
            if side.is_finished:
                continue
            token, reason = 6 if n and i == 9 else 5, "length" if ends and n and i == 9 else None
            update: Any = Update(0, "", [token], [-1.0], [[]], [logits_V + n], reason)  # type: ignore[arg-type]
            side.events(update)
            found += difference.events()
    assert [event["tokens"] for event in found] == [*range(1, 11)]
    assert found[-1]["logits"] == 1
    assert [len(side.logits) for side in sides] == [0, 0]
