"""Break it: every known fault, planted into one framework of a small checkpoint, is named by the doctor."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from minillm_core.config import ModelConfig
from minillm_core.doctor.faults import FAULTS
from minillm_core.errors import InputError
from minillm_core.model.reference import Reference
from minillm_core.model.stages import stage_names
from minillm_core.serving import break_it
from minillm_core.serving.break_it import Breaker
from minillm_core.serving.break_it_routes import break_it_router
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.conftest import BACKENDS, TINY, Tier, random_tokens, random_weights
from parity_tests.test_doctor import CONFIG as UNTIED
from parity_tests.test_doctor import subject

pytestmark = pytest.mark.extended

CONFIG = replace(UNTIED, vocab_size=TINY.vocab_size)
SIDES = [*BACKENDS]


@pytest.fixture(scope="module")
def breaker(tokenizer: Tokenizer) -> Breaker:
    """An untied GQA model with scaled RoPE, which can have every known fault."""
    return breaker_of(CONFIG, tokenizer)


def breaker_of(config: ModelConfig, tokenizer: Tokenizer | None) -> Breaker:
    breaker = Breaker("unused")
    breaker._subject = replace(subject("jax", config, random_weights(config)), tokenizer=tokenizer)
    return breaker


@pytest.mark.parametrize("fault", [fault.name for fault in FAULTS])
def test_every_fault_is_named(fault: str, breaker: Breaker) -> None:
    """In all its forms, the side in turn. Everything in the result is JSON."""
    for i, form in enumerate(breaker.faults()[fault]):
        side = SIDES[i % 2]
        result = breaker.break_it(fault, side, form=i)
        assert result["named"], (form.says, result["findings"])
        assert not result["equal"]
        assert {finding["fault"] for finding in result["findings"]} == {fault}
        assert {finding["subject"] for finding in result["findings"]} == {"B"}
        assert {finding["place"] for finding in result["findings"]} == {form.place} == {result["place"]}
        assert result["computed_by"] == ("reference" if form.place == "code" else side)
        assert result["right_side"] == SIDES[1 - i % 2]
        assert result["first_divergence"]["stage"] in result["report"]
        assert [cell["stage"] for row in result["layers"] for cell in row["cells"]] == stage_names(CONFIG)
        json.dumps(result, allow_nan=False)


def test_right_model_is_left_alone(breaker: Breaker, float64: Tier) -> None:
    """A fault is planted in a copy: the same model is right again in the next request."""
    assert breaker._subject is not None
    before = {name: weight.copy() for name, weight in breaker._subject.weights.items()}
    results = [breaker.break_it(name, "torch") for name in ("swapped", "rope-theta", "swapped")]
    assert results[0]["layers"] == results[2]["layers"]
    assert all(np.array_equal(breaker._subject.weights[name], weight) for name, weight in before.items())
    tokens = random_tokens(CONFIG, 1, 20)
    logits = BACKENDS["jax"].trace(CONFIG, breaker._subject.weights, tokens, "float64").stages["logits"]
    assert np.abs(logits - Reference(CONFIG, before).trace(tokens).stages["logits"]).max() < 1e-11


def test_other_threads_keep_their_precision(breaker: Breaker) -> None:
    """JAX's 64-bit mode is on during the computation only, so a server goes on in float32."""
    assert not jax.config.read("jax_enable_x64")
    breaker.break_it("scale", "torch")
    assert not jax.config.read("jax_enable_x64")


def test_text_of_the_user(breaker: Breaker) -> None:
    text = "We the people of the United States"
    result = breaker.break_it("activation", "jax", text)
    assert result["text"].strip() == text
    assert result["n_tokens"] == len(breaker._subject.tokenizer.encode(text, bos=True))  # type: ignore[union-attr]
    assert result["sample"]["right"]
    for name in ("right", "broken"):
        likely = [token["logprob"] for token in result["next"][name]]
        assert likely == sorted(likely, reverse=True)
        assert 0 < sum(map(np.exp, likely)) <= 1
    assert result["loss"]["right"] != result["loss"]["broken"]
    assert breaker.break_it("activation", "jax", "a " * 1000)["n_tokens"] == break_it.MOST_TOKENS


def test_large_models_do_not_go_on(breaker: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_it, "LARGEST_SAMPLED", 1000)
    result = breaker.break_it("swapped", "jax")
    assert result["sample"] is None
    assert result["next"]["broken"]


def test_without_a_tokenizer() -> None:
    breaker = breaker_of(CONFIG, None)
    result = breaker.break_it("swapped", "jax")
    assert result["named"]
    assert (result["text"], result["next"], result["sample"]) == (None, None, None)
    with pytest.raises(InputError, match="needs a tokenizer"):
        breaker.break_it("swapped", "jax", "a text")


def test_faults_that_a_model_cannot_have(tokenizer: Tokenizer) -> None:
    """A tied model with one KV head for every query head has no second head matrix, and no groups."""
    breaker = breaker_of(replace(TINY, width=64, n_kv_heads=4), tokenizer)
    assert {fault.name for fault in FAULTS} - breaker.faults().keys() == {"tied-head", "head-groups"}
    with pytest.raises(InputError, match="this model cannot have this fault"):
        breaker.break_it("tied-head", "jax")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fault": "nonsense", "side": "jax"}, "unknown fault"),
        ({"fault": "scale", "side": "numpy"}, "unknown side\n  expected: jax or torch\n  found: 'numpy'"),
        ({"fault": "scale", "side": "jax", "form": 99}, "unknown form of scale\n  expected: 0 to 3"),
        ({"fault": "scale", "side": "jax", "form": -1}, "unknown form of scale"),
    ],
)
def test_bad_requests(arguments: dict[str, object], message: str, breaker: Breaker) -> None:
    """In Python, and as the answer of the endpoint."""
    with pytest.raises(InputError, match="unknown") as raised:
        breaker.break_it(**arguments)  # type: ignore[arg-type]
    assert str(raised.value).startswith(message)
    answer = client(breaker).post("/playground/break", json=arguments)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == str(raised.value)


def test_endpoints(breaker: Breaker, tmp_path: Path) -> None:
    served = client(breaker)
    listed = served.get("/playground/faults").json()
    assert [fault["name"] for fault in listed["faults"]] == [fault.name for fault in FAULTS]
    assert all(fault["says"] == fault["forms"][0] for fault in listed["faults"])
    assert listed["sides"] == SIDES
    result = served.post("/playground/break", json={"fault": "rope-theta", "side": "torch", "text": ""}).json()
    assert result == breaker.break_it("rope-theta", "torch")
    answer = client(Breaker(tmp_path / "nothing")).get("/playground/faults")
    assert answer.status_code == 400
    assert "no such checkpoint" in answer.json()["error"]["message"]


def client(breaker: Breaker) -> TestClient:
    app = FastAPI()
    app.include_router(break_it_router(breaker))
    return TestClient(app)
