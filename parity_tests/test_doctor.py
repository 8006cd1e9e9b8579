"""Known faults, planted one at a time in a correct model: the parity checks fail, and the doctor names each fault."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from minillm_core.config import ModelConfig, RopeScaling
from minillm_core.doctor.examine import Report, examine
from minillm_core.doctor.subjects import Subject
from minillm_core.doctor.weights import explain_weights
from minillm_core.model.reference import Reference
from minillm_core.model.rope import half_split, interleaved
from minillm_core.tensors import Tensors
from parity_tests.conftest import (
    BACKENDS,
    MODELS,
    TIERS,
    TINY,
    Tier,
    assert_close,
    make_pair,
    random_tokens,
    random_weights,
)
from parity_tests.test_transformers import named

CONFIG = ModelConfig(
    vocab_size=211, context_length=512, width=64, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=8, hidden=96,
    tie_embeddings=False, rope_theta=50_000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64), norm_eps=1e-5,
)  # fmt: skip
TOKENS = random_tokens(CONFIG, 2, 300)
H = CONFIG.resolved_head_dim


def subject(framework: str, config: ModelConfig, weights: Tensors) -> Subject:
    run = BACKENDS[framework].trace
    return Subject(framework, Path("memory"), config, weights, framework, run)


def report_of(a: Subject, b: Subject, tokens: np.ndarray = TOKENS, dtype: str = "float64") -> Report:
    return examine(a, b, tokens, dtype, rows_of_text=0)


@pytest.mark.parametrize("name", named(MODELS))
def test_reference_matches_both_frameworks(name: str, float64: Tier) -> None:
    """In float64, every stage of both frameworks equals that of the numpy reference."""
    config = MODELS[name]
    weights, tokens = random_weights(config), random_tokens(config, 2, 257)
    for framework, backend in BACKENDS.items():
        trace = backend.trace(config, weights, tokens, "float64")
        for stage, expected in Reference(config, weights).stages(tokens):
            assert_close(f"{framework} {stage}", trace.stages[stage], expected, 1e-12)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_equal_models_are_reported_equal(dtype: str, float64: Tier) -> None:
    for config in (CONFIG, MODELS["gqa"]):
        weights = random_weights(config, sharpness=1.0)
        tokens = random_tokens(config, 2, 300)
        report = report_of(subject("torch", config, weights), subject("jax", config, weights), tokens, dtype)
        assert report.equal, report
        assert report.first_divergence is None
        assert not report.findings


# Faults in files: name -> the doctor's name of the fault, a pattern of its explanation, the change to the model.

Change = Callable[[ModelConfig, Tensors], tuple[ModelConfig, Tensors]]


def weights_changed(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def plant(config: ModelConfig, weights: Tensors) -> tuple[ModelConfig, Tensors]:
        return config, {name: change(w) if re.search(pattern, name) else w for name, w in weights.items()}

    return plant


def config_changed(**fields: Any) -> Change:
    return lambda config, weights: (replace(config, **fields), weights)


def swapped(one: str, other: str, layer: str = r"\d") -> Change:
    def plant(config: ModelConfig, weights: Tensors) -> tuple[ModelConfig, Tensors]:
        names = {one: other, other: one}
        pattern = re.compile(rf"(?<=layers\.)({layer})\.(.*\.|)({one}|{other})")

        def source(name: str) -> str:
            return pattern.sub(lambda m: f"{m[1]}.{m[2]}{names[m[3]]}", name)

        return config, {name: weights[source(name)] for name in weights}

    return plant


def heads(order: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: w.reshape(len(order), H, -1)[order].reshape(w.shape)


def tied(config: ModelConfig, weights: Tensors) -> tuple[ModelConfig, Tensors]:
    weights = {name: w for name, w in weights.items() if name != "lm_head.weight"}
    return replace(config, tie_embeddings=True), weights


def layers_as_text(config: ModelConfig, weights: Tensors) -> tuple[ModelConfig, Tensors]:
    order = sorted(range(config.n_layers), key=str)

    def source(name: str) -> str:
        return re.sub(r"layers\.(\d+)", lambda m: f"layers.{order[int(m[1])]}", name)

    return config, {name: weights[source(name)] for name in weights}


def layer_copied(config: ModelConfig, weights: Tensors) -> tuple[ModelConfig, Tensors]:
    return config, {name: weights[name.replace("layers.2", "layers.1")] for name in weights}


def rounded(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: w.astype(dtype).astype(np.float32)


def quantised(w: np.ndarray) -> np.ndarray:
    """A second, independent implementation of GGUF's q8_0."""
    out = np.empty_like(w)
    for i, block in enumerate(w.reshape(-1, 32)):
        scale = np.float32(np.abs(block).max() / np.float32(127))
        ints = [int(abs(x * np.float32(1 / scale)) + np.float32(0.5)) * (1 if x >= 0 else -1) for x in block]
        out.reshape(-1, 32)[i] = np.array(ints, np.float32) * np.float32(np.float16(scale))
    return out


def interleave(w: np.ndarray) -> np.ndarray:
    return interleaved(w, H)


def swap_halves(w: np.ndarray) -> np.ndarray:
    return w.reshape(-1, 2, H // 2, w.shape[1])[:, ::-1].reshape(w.shape)


# fmt: off
FILES: dict[str, tuple[str, str, Change]] = {
    "interleaved q and k": ("rope-layout", "stored for interleaved", weights_changed("[qk]_proj", interleave)),
    "interleaved q in layer 1": ("rope-layout", "stored for", weights_changed(r"1\.self_attn\.q_proj", interleave)),
    "un-interleaved twice": ("rope-layout", "already", weights_changed("[qk]_proj", lambda w: half_split(w, H))),
    "halves swapped": ("rope-direction", "halves", weights_changed("[qk]_proj", swap_halves)),
    "q transposed": ("transposed", "q_proj is", weights_changed("q_proj", np.transpose)),
    "o transposed in layer 2": ("transposed", "o_proj is", weights_changed(r"2\.self_attn\.o_proj", np.transpose)),
    "KV heads shuffled": ("head-order", r"k_proj .* \[2, 0, 3, 1\]", weights_changed("[kv]_proj", heads([2, 0, 3, 1]))),
    "q heads shuffled": ("head-order", "of q_proj", weights_changed("q_proj", heads([0, 4, 1, 5, 2, 6, 3, 7]))),
    "gate and up swapped": ("swapped", "gate_proj and up_proj", swapped("gate_proj", "up_proj")),
    "gate and up swapped in layer 0": ("swapped", "gate_proj and up_proj", swapped("gate_proj", "up_proj", "0")),
    "k and v swapped": ("swapped", "k_proj and v_proj", swapped("k_proj", "v_proj")),
    "norms swapped": ("swapped", "input_layernorm", swapped("input_layernorm", "post_attention_layernorm")),
    "norms minus one": ("norm-weights", "w - 1", weights_changed("norm", lambda w: w - np.float32(1))),
    "norms plus one": ("norm-weights", r"1 \+ w", weights_changed("norm", lambda w: w + np.float32(1))),
    "layer 2 copied": ("layer-order", "^layer 2 has the weights of A's layer 1$", layer_copied),
    "layers sorted as text": ("layer-order", "as text", layers_as_text),
    "bfloat16": ("rounding", "bfloat16", weights_changed("", rounded(ml_dtypes.bfloat16))),
    "float16": ("rounding", "float16", weights_changed("_proj", rounded(np.float16))),
    "q8_0": ("rounding", "q8_0", weights_changed("_proj|embed", quantised)),
    "eps": ("norm-eps", "1e-06, not 1e-05", config_changed(norm_eps=1e-6)),
    "theta": ("rope-theta", "10000, not 50000", config_changed(rope_theta=10_000.0)),
    "window": ("sliding-window", "is 20; it should be absent", config_changed(sliding_window=20)),
    "an uncommon theta": ("rope-theta", "77777, not 50000", config_changed(rope_theta=77_777.0)),
    "no rope_scaling": ("rope-scaling", "missing", config_changed(rope_scaling=None)),
    "wrong rope_scaling": ("rope-scaling", "factor=32", config_changed(rope_scaling=RopeScaling(32.0, 1.0, 4.0, 64))),
    "wrong heads": ("head-shape", "head_dim is 16", config_changed(n_heads=4, n_kv_heads=2, head_dim=16)),
    "scale folded into q": ("scale", r"by 0\.35355$", weights_changed("q_proj", lambda w: w * np.float32(H**-0.5))),
    "up 1 % too large": ("scale", r"up_proj .* by 1\.01$", weights_changed("up_proj", lambda w: w * np.float32(1.01))),
    "tokens shifted": ("row-order", r"\+1", weights_changed("embed", lambda w: np.concatenate([w[:1], w[:-1]]))),
    "untied head lost": ("tied-head", "is the embedding", tied),
}
# fmt: on


@pytest.mark.extended
@pytest.mark.parametrize("fault", FILES)
def test_file_faults_are_named(fault: str, float64: Tier) -> None:
    name, words, plant = FILES[fault]
    config = replace(CONFIG, n_layers=11) if fault == "layers sorted as text" else CONFIG
    weights = random_weights(config)
    changed = plant(config, weights)
    report = report_of(subject("torch", config, weights), subject("jax", *changed))
    assert not report.equal
    assert report.first_divergence is not None
    assert [finding.fault for finding in report.findings if finding.fault != name] == []
    assert any(re.search(words, finding.says) for finding in report.findings), report.findings
    assert {finding.subject for finding in report.findings} == {"B"}
    assert {finding.place for finding in report.findings} <= {"weights", "configuration"}
    pair = make_pair(config, TIERS["float64"])
    logits = BACKENDS["jax"].trace(*changed, TOKENS, "float64").stages["logits"]
    with pytest.raises(AssertionError, match="differs by"):  # the comparison of test_model.py
        assert_close("logits", pair.logits(TOKENS)[1], logits, TIERS["float64"].logits)


@pytest.mark.extended
def test_several_faults_at_once_are_named(float64: Tier) -> None:
    """Faults in the weights and in the configuration at the same time."""
    weights = random_weights(CONFIG)
    config, changed = CONFIG, weights
    for name in ("interleaved q and k", "gate and up swapped in layer 0", "bfloat16", "eps", "no rope_scaling"):
        config, changed = FILES[name][2](config, changed)
    report = report_of(subject("torch", CONFIG, weights), subject("jax", config, changed))
    named = {finding.fault for finding in report.findings}
    assert named == {"rope-layout", "swapped", "rounding", "norm-eps", "rope-scaling"}


@pytest.mark.extended
@pytest.mark.parametrize(
    ("faults_of_a", "faults_of_b", "evidence"),
    [
        ([], ["interleaved q and k"], {"rope-layout": "to A reproduces B exactly"}),
        ([], ["bfloat16"], {"rounding": "to A reproduces B exactly"}),
        (["bfloat16"], [], {"rounding": "to B reproduces A exactly"}),
        ([], ["up 1 % too large"], {"scale": "to A reproduces B up to the last bits"}),
        (
            [],
            ["interleaved q and k", "bfloat16"],
            {
                "rope-layout": "to A reproduces B up to the rounding",
                "rounding": "to A, changed as above, reproduces B exactly",
            },
        ),
        (
            ["bfloat16"],
            ["interleaved q and k"],
            {
                "rope-layout": "to A reproduces B up to the rounding",
                "rounding": "to B reproduces A, changed as above, exactly",
            },
        ),
    ],
)
def test_evidence_says_what_was_checked(
    faults_of_a: list[str], faults_of_b: list[str], evidence: dict[str, str]
) -> None:
    """Which of the two a change applies to, and how exactly it then gives the other."""
    subjects = []
    for faults in (faults_of_a, faults_of_b):
        config, weights = CONFIG, random_weights(CONFIG)
        for name in faults:
            config, weights = FILES[name][2](config, weights)
        subjects.append(subject("torch", config, weights))
    found = {finding.fault: finding.evidence for finding in explain_weights(*subjects)}
    assert found.keys() == evidence.keys()
    for fault, words in evidence.items():
        assert found[fault].startswith(f"applying this change {words} ("), found


@pytest.mark.extended
def test_fault_that_a_short_prompt_misses(float64: Tier) -> None:
    """A missing rope_scaling changes only the low frequencies: 5 tokens agree in float32, 500 do not."""
    config = replace(CONFIG, rope_theta=1e8, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 5_000_000))
    weights = random_weights(config)
    right, wrong = subject("torch", config, weights), subject("jax", replace(config, rope_scaling=None), weights)
    short, long = random_tokens(config, 2, 5), random_tokens(config, 2, 500)
    assert report_of(right, wrong, short, "float32").equal
    for dtype in ("float32", "float64"):
        report = report_of(right, wrong, long, dtype)
        assert not report.equal
        assert [finding.fault for finding in report.findings] == ["rope-scaling"]


@pytest.mark.extended
def test_unused_embedding_row_is_compared(float64: Tier) -> None:
    """In an untied model, a changed embedding row is found even if no token of the test reads it."""
    weights = random_weights(CONFIG)
    embedding = weights["model.embed_tokens.weight"].copy()
    unseen = next(i for i in range(CONFIG.vocab_size) if i not in TOKENS[:, :50])
    embedding[unseen] = 7
    changed = weights | {"model.embed_tokens.weight": embedding}
    for dtype in ("float64", "bfloat16"):
        report = report_of(subject("torch", CONFIG, weights), subject("jax", CONFIG, changed), TOKENS[:, :50], dtype)
        assert not report.equal
        assert [(f.fault, f.place) for f in report.findings] == [("unknown", "weights")]
        assert f"in rows [{unseen}]" in report.findings[0].evidence


@pytest.mark.extended
def test_further_training_is_not_reported_as_rounding(float64: Tier) -> None:
    weights = random_weights(CONFIG)
    rng = np.random.default_rng(7)
    changed = {
        name: (w + 0.005 * w.std() * rng.standard_normal(w.shape)).astype(np.float32) for name, w in weights.items()
    }
    report = report_of(subject("torch", CONFIG, weights), subject("jax", CONFIG, changed))
    assert [(f.fault, f.place) for f in report.findings] == [("unknown", "weights")]


@pytest.mark.extended
def test_tied_and_untied_copies_are_equal(float64: Tier) -> None:
    """Both compute the same function, so they are equal. The gradients of embedding and head are added first."""
    tied = replace(CONFIG, tie_embeddings=True)
    weights = random_weights(tied)
    twin = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    for a, b in (((tied, weights), (CONFIG, twin)), ((CONFIG, twin), (tied, weights))):
        report = report_of(subject("torch", *a), subject("jax", *b))
        assert report.equal
        assert "tie_embeddings" in report.configuration


@pytest.mark.extended
def test_nan_is_never_equal(float64: Tier) -> None:
    weights = random_weights(TINY)
    broken = weights | {"model.norm.weight": np.full(TINY.width, np.nan)}
    for b in (weights, broken):
        assert not report_of(subject("torch", TINY, broken), subject("jax", TINY, b), random_tokens(TINY, 1, 8)).equal


@pytest.mark.extended
def test_weights_differing_in_the_last_bits(float64: Tier) -> None:
    """The files differ, so the doctor reports the weights and says nothing about the code."""
    weights = random_weights(TINY)
    name = "model.layers.0.mlp.up_proj.weight"
    other = weights | {name: np.nextafter(weights[name], np.float32(np.inf))}
    report = report_of(subject("torch", TINY, weights), subject("torch", TINY, other), random_tokens(TINY, 1, 8))
    assert not report.equal
    assert [(f.fault, f.place) for f in report.findings] == [("rounding", "weights")]
    assert "last bits" in report.findings[0].says
