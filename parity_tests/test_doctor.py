"""Known faults, planted one at a time in a right model: the parity suite fails, and the doctor names each of them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from minillm_core.backend import Trace
from minillm_core.checkpoints import Tensors
from minillm_core.config import ModelConfig, RopeScaling
from minillm_core.doctor import Report, examine
from minillm_core.reference import Reference
from minillm_core.rope import half_split, interleaved
from minillm_core.subjects import Subject
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


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_reference_is_the_model(config: ModelConfig, float64: Tier) -> None:
    """Every stage of both frameworks is the numpy reference's, in float64."""
    weights, tokens = random_weights(config), random_tokens(config, 2, 257)
    for framework, backend in BACKENDS.items():
        trace = backend.trace(config, weights, tokens, "float64")
        for name, stage in Reference(config, weights).stages(tokens):
            assert_close(f"{framework} {name}", trace.stages[name], stage, 1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_equal_models_are_equal(dtype: str, float64: Tier) -> None:
    for config in (CONFIG, MODELS["gqa"]):
        weights = random_weights(config, sharpness=1.0)
        tokens = random_tokens(config, 2, 300)
        report = report_of(subject("torch", config, weights), subject("jax", config, weights), tokens, dtype)
        assert report.equal, report
        assert report.first_divergence is None
        assert not report.findings


# Faults of files: name -> what the doctor calls it, a word of its explanation, the change.

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


def rounded(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: w.astype(dtype).astype(np.float32)


def quantised(w: np.ndarray) -> np.ndarray:
    """GGUF's q8_0, written down once more."""
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
    "un-interleaved twice": ("rope-layout", "un-interl", weights_changed("[qk]_proj", lambda w: half_split(w, H))),
    "halves swapped": ("rope-direction", "halves", weights_changed("[qk]_proj", swap_halves)),
    "q transposed": ("transposed", "q_proj is", weights_changed("q_proj", np.transpose)),
    "o transposed in layer 2": ("transposed", "o_proj is", weights_changed(r"2\.self_attn\.o_proj", np.transpose)),
    "KV heads shuffled": ("head-order", r"k_proj .* \[2, 0, 3, 1\]", weights_changed("[kv]_proj", heads([2, 0, 3, 1]))),
    "q heads shuffled": ("head-order", "of q_proj", weights_changed("q_proj", heads([0, 4, 1, 5, 2, 6, 3, 7]))),
    "gate and up swapped": ("swapped", "gate_proj and up_proj", swapped("gate_proj", "up_proj")),
    "gate and up swapped in layer 0": ("swapped", "gate_proj and up_proj", swapped("gate_proj", "up_proj", "0")),
    "k and v swapped": ("swapped", "k_proj and v_proj", swapped("k_proj", "v_proj")),
    "norms swapped": ("swapped", "input_layernorm", swapped("input_layernorm", "post_attention_layernorm")),
    "norms less one": ("norm-weights", "w - 1", weights_changed("norm", lambda w: w - np.float32(1))),
    "norms plus one": ("norm-weights", r"1 \+ w", weights_changed("norm", lambda w: w + np.float32(1))),
    "layers sorted as text": ("layer-order", "as text", layers_as_text),
    "bfloat16": ("rounding", "bfloat16", weights_changed("", rounded(ml_dtypes.bfloat16))),
    "float16": ("rounding", "float16", weights_changed("_proj", rounded(np.float16))),
    "q8_0": ("rounding", "q8_0", weights_changed("_proj|embed", quantised)),
    "eps": ("norm-eps", "1e-06, not 1e-05", config_changed(norm_eps=1e-6)),
    "theta": ("rope-theta", "10000, not 50000", config_changed(rope_theta=10_000.0)),
    "an uncommon theta": ("rope-theta", "77777, not 50000", config_changed(rope_theta=77_777.0)),
    "no rope_scaling": ("rope-scaling", "missing", config_changed(rope_scaling=None)),
    "other rope_scaling": ("rope-scaling", "factor=32", config_changed(rope_scaling=RopeScaling(32.0, 1.0, 4.0, 64))),
    "other heads": ("head-shape", "head_dim is 16", config_changed(n_heads=4, n_kv_heads=2, head_dim=16)),
    "own head lost": ("tied-head", "is the embedding", tied),
}
# fmt: on


@pytest.mark.parametrize("fault", FILES)
def test_faults_of_files_are_named(fault: str, float64: Tier) -> None:
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
    with pytest.raises(AssertionError, match="differs by"):  # as test_model.py compares logits
        assert_close("logits", pair.logits(TOKENS)[1], logits, TIERS["float64"].logits)


# Faults of code, planted in one framework: name -> what the doctor calls it, a word of its explanation, the module and
# name of what is replaced, and its replacement, made of the framework's array functions and of what is right.

Make = Callable[[Any, Any], Any]


def interleaved_rotation(xp: Any, right: Any) -> Any:
    def apply_rope(x: Any, cos: Any, sin: Any) -> Any:
        even, odd, half = x[..., ::2], x[..., 1::2], x.shape[-1] // 2
        cos, sin = cos[..., half:], sin[..., half:]
        return xp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)

    return apply_rope


def rotation(change: Callable[..., Any]) -> Make:
    """`apply_rope` with its cosines and sines changed."""
    return lambda xp, right: lambda x, cos, sin: right(x, *change(cos, sin))


def table_of(**fields: Any) -> Make:
    """The rotary table of another configuration."""
    return lambda xp, right: lambda config: right(replace(config, **fields))


def attention(change: Callable[..., Any]) -> Make:
    """`attend` with its queries, keys, values and mask changed."""
    return lambda xp, right: lambda q, k, v, mask: right(*change(xp, q, k, v, mask))


def tiled(xp: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    groups = q.shape[2] // k.shape[1]
    return q, xp.concatenate([k] * groups, 1), xp.concatenate([v] * groups, 1), mask


def mlp(activation: Callable[[Any, Any], Any], gate: str = "gate_proj", up: str = "up_proj") -> Make:
    def make(xp: Any, right: Any) -> Any:
        def call(self: Any, x: Any) -> Any:
            return self.down_proj(activation(xp, getattr(self, gate)(x)) * getattr(self, up)(x))

        return call

    return make


def silu(xp: Any, x: Any) -> Any:
    return x / (1 + xp.exp(-x))


def gelu(xp: Any, x: Any) -> Any:
    return x * (1 + (torch.erf if xp is torch else jax.scipy.special.erf)(x / 2**0.5)) / 2


def one_plus_weight(xp: Any, right: Any) -> Any:
    def call(self: Any, x: Any) -> Any:
        return right(self, x) + x / xp.sqrt((x * x).mean(-1)[..., None] + self.eps)

    return call


def fixed_eps(xp: Any, right: Any) -> Any:
    def init(self: Any, width: int, *, eps: float, param_dtype: Any) -> None:
        right(self, width, eps=1e-6, param_dtype=param_dtype)

    return init


def no_norm(xp: Any, right: Any) -> Any:
    class NoNorm(right):  # type: ignore[misc]
        def __call__(self, x: Any) -> Any:
            return super().__call__(x) if xp is torch else x

        def forward(self, x: Any) -> Any:
            return x

    return NoNorm


def sees_all(xp: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    return q, k, v, xp.zeros_like(mask)


def queries_times(factor: float) -> Make:
    return attention(lambda xp, q, k, v, mask: (q * factor, k, v, mask))


def scaled_embedding(xp: Any, right: Any) -> Any:
    return lambda self, tokens: right(self, tokens) * CONFIG.width**0.5


def tied_head(xp: Any, right: Any) -> Any:
    return lambda self, x: self.model.embed_tokens.attend(x)


# fmt: off
CODE: dict[str, tuple[str, str, str, Make]] = {
    "interleaved rotation": ("rope-layout", "2i and 2i", "layers.apply_rope", interleaved_rotation),
    "rotated backwards": ("rope-direction", "other way", "layers.apply_rope", rotation(lambda cos, sin: (cos, -sin))),
    "not rotated": ("rope-direction", "missing", "layers.apply_rope", rotation(lambda cos, sin: (cos**0, 0 * sin))),
    "theta forgotten": ("rope-theta", "10000, not", "weights.rope_table", table_of(rope_theta=10_000.0)),
    "rope_scaling forgotten": ("rope-scaling", "missing", "weights.rope_table", table_of(rope_scaling=None)),
    "tiled KV heads": ("head-groups", "n % K", "layers.attend", attention(tiled)),
    "no scale": ("scale", "missing", "layers.attend", queries_times(H**0.5)),
    "scale by width": ("scale", "width", "layers.attend", queries_times((H / CONFIG.width) ** 0.5)),
    "no causal mask": ("causal-mask", "later tokens", "layers.attend", attention(sees_all)),
    "eps forgotten": ("norm-eps", "1e-06, not 1e-05", "layers.RMSNorm.__init__", fixed_eps),
    "through float32": ("cast", "float32", "layers.at_least_float32", lambda xp, right: lambda dtype: xp.float32),
    "gate and up exchanged": ("swapped", "gate_proj and up_proj", "layers.MLP.call", mlp(silu, "up_proj", "gate_proj")),
    "gelu": ("activation", "gelu", "layers.MLP.call", mlp(gelu)),
    "one plus weight": ("norm-weights", r"1 \+ w", "layers.RMSNorm.call", one_plus_weight),
    "scaled embedding": ("scale", "embedding", "layers.Embedding.call", scaled_embedding),
    "no final norm": ("norm-weights", "final norm", "model.RMSNorm", no_norm),
    "head tied": ("tied-head", "is the embedding", "model.MiniLLM.head", tied_head),
}
# fmt: on


def plant(monkeypatch: pytest.MonkeyPatch, framework: str, place: str, make: Make) -> None:
    module, _, path = place.partition(".")
    owner = __import__(f"minillm_{framework}.{module}", fromlist=["*"])
    *classes, name = path.replace("call", "forward" if framework == "torch" else "__call__").split(".")
    for part in classes:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, name, make(torch if framework == "torch" else jnp, getattr(owner, name)))


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("fault", CODE)
def test_faults_of_code_are_named(fault: str, framework: str, float64: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    name, words, place, make = CODE[fault]
    theta = CONFIG.rope_theta + (1 + list(CODE).index(fault)) * (framework == "jax")  # what is compiled has the fault
    config = replace(CONFIG, rope_theta=theta)
    weights, other = random_weights(config), "torch" if framework == "jax" else "jax"
    plant(monkeypatch, framework, place, make)
    right, wrong = subject(other, config, weights), subject(framework, config, weights)
    a, b, letter = (right, wrong, "B") if framework == "torch" else (wrong, right, "A")
    report = report_of(a, b)
    assert not report.equal
    assert {(f.fault, f.subject, f.place) for f in report.findings} == {(name, letter, "code")}, report.findings
    assert len(report.findings) == 1 or name == "cast", report.findings  # a cast is at home in several stages
    assert re.search(words, report.findings[0].says), report.findings
    logits = [BACKENDS[key].trace(config, weights, TOKENS, "float64").stages["logits"] for key in BACKENDS]
    with pytest.raises(AssertionError, match="differs by"):
        assert_close("logits", *logits, TIERS["float64"].logits)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize(
    ("words", "place", "make"),
    [
        ("output head's part", "layers.Embedding.attend", lambda xp, right: lambda self, x: stopped(self, right, x)),
        ("2 times", "tracing.mean_loss", lambda xp, right: lambda model, tokens: 2 * right(model, tokens)),
    ],
    ids=["head cut off", "scaled"],
)
def test_faults_of_gradients_are_named(
    words: str, place: str, make: Make, framework: str, float64: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, tie_embeddings=True, rope_theta=1e6 + len(words) * (framework == "jax"))
    weights, other = random_weights(config), "torch" if framework == "jax" else "jax"
    plant(monkeypatch, framework, place, make)
    report = report_of(subject(other, config, weights), subject(framework, config, weights))
    assert not report.equal
    assert report.first_divergence is None
    assert [(f.fault, f.subject) for f in report.findings] == [("gradient", "B")]
    assert words in report.findings[0].says


def stopped(embedding: Any, attend: Any, x: Any) -> Any:
    """The head's logits without a gradient for its matrix: those of the input alone."""
    if isinstance(x, torch.Tensor):
        return x @ embedding.weight.detach().T
    return x @ jax.lax.stop_gradient(embedding.embedding[...]).T


def test_several_faults_are_named_together(float64: Tier) -> None:
    """In weights, configuration and code at once."""
    weights = random_weights(CONFIG)
    config, changed = CONFIG, weights
    for name in ("interleaved q and k", "gate and up swapped in layer 0", "bfloat16", "eps", "no rope_scaling"):
        config, changed = FILES[name][2](config, changed)
    report = report_of(subject("torch", CONFIG, weights), subject("jax", config, changed))
    named = {finding.fault for finding in report.findings}
    assert named == {"rope-layout", "swapped", "rounding", "norm-eps", "rope-scaling"}


def test_what_a_short_prompt_would_miss(float64: Tier) -> None:
    """Forgotten rope_scaling slows long waves alone: five tokens agree in float32, five hundred do not."""
    config = replace(CONFIG, rope_theta=1e8, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 5_000_000))
    weights = random_weights(config)
    right, wrong = subject("torch", config, weights), subject("jax", replace(config, rope_scaling=None), weights)
    short, long = random_tokens(config, 2, 5), random_tokens(config, 2, 500)
    assert report_of(right, wrong, short, "float32").equal
    for dtype in ("float32", "float64"):
        report = report_of(right, wrong, long, dtype)
        assert not report.equal
        assert [finding.fault for finding in report.findings] == ["rope-scaling"]


@pytest.mark.parametrize("framework", BACKENDS)
def test_a_fault_in_the_code_of_one_layer(framework: str, float64: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named once, and at that layer."""
    config = replace(CONFIG, rope_theta=3e4 + (framework == "jax"))
    weights, other = random_weights(config), "torch" if framework == "jax" else "jax"
    calls = iter(range(10**6))

    def in_layer_1(xp: Any, right: Any) -> Any:
        wrong = mlp(silu, "up_proj", "gate_proj")(xp, right)
        return lambda self, x: (wrong if next(calls) % CONFIG.n_layers == 1 else right)(self, x)

    plant(monkeypatch, framework, "layers.MLP.call", in_layer_1)
    report = report_of(subject(other, config, weights), subject(framework, config, weights))
    assert [(f.fault, f.subject) for f in report.findings] == [("swapped", "B")], report.findings
    assert report.findings[0].evidence.startswith("so planted, model.layers.1.mlp agrees")


def test_what_no_token_shows(float64: Tier) -> None:
    """A row of the embedding that no token reads, of an untied model."""
    weights = random_weights(CONFIG)
    embedding = weights["model.embed_tokens.weight"].copy()
    unseen = next(i for i in range(CONFIG.vocab_size) if i not in TOKENS[:, :50])
    embedding[unseen] = 7
    changed = weights | {"model.embed_tokens.weight": embedding}
    for dtype in ("float64", "bfloat16"):
        report = report_of(subject("torch", CONFIG, weights), subject("jax", CONFIG, changed), TOKENS[:, :50], dtype)
        assert not report.equal
        assert [(f.fault, f.place) for f in report.findings] == [("unknown", "weights")]


def test_other_training_steps_are_no_rounding(float64: Tier) -> None:
    weights = random_weights(CONFIG)
    rng = np.random.default_rng(0)
    changed = {
        name: (w + 0.005 * w.std() * rng.standard_normal(w.shape)).astype(np.float32) for name, w in weights.items()
    }
    report = report_of(subject("torch", CONFIG, weights), subject("jax", CONFIG, changed))
    assert [(f.fault, f.place) for f in report.findings] == [("unknown", "weights")]


def test_a_tied_model_and_its_untied_twin(float64: Tier) -> None:
    """The same function: equal, gradients taken together; with another head it is named."""
    tied = replace(CONFIG, tie_embeddings=True)
    weights = random_weights(tied)
    twin = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    for a, b in (((tied, weights), (CONFIG, twin)), ((CONFIG, twin), (tied, weights))):
        report = report_of(subject("torch", *a), subject("jax", *b))
        assert report.equal
        assert "tie_embeddings" in report.configuration


def test_both_wrong_alike_is_noticed(float64: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models that are equal, and neither of which computes what its files say."""
    config = replace(CONFIG, rope_theta=4e4)
    weights = random_weights(config)
    for framework in BACKENDS:
        plant(monkeypatch, framework, "layers.attend", attention(tiled))
    report = report_of(subject("torch", config, weights), subject("jax", config, weights))
    assert report.equal
    assert [(f.fault, f.subject) for f in report.findings] == [("head-groups", "A"), ("head-groups", "B")]


def test_nan_equals_nothing(float64: Tier) -> None:
    weights = random_weights(TINY)
    broken = weights | {"model.norm.weight": np.full(TINY.width, np.nan)}
    for b in (weights, broken):
        assert not report_of(subject("torch", TINY, broken), subject("jax", TINY, b), random_tokens(TINY, 1, 8)).equal


def test_weights_that_differ_in_the_last_bits(float64: Tier) -> None:
    """The files differ, so nothing is said of the code."""
    weights = random_weights(TINY)
    name = "model.layers.0.mlp.up_proj.weight"
    other = weights | {name: np.nextafter(weights[name], np.float32(np.inf))}
    report = report_of(subject("torch", TINY, weights), subject("torch", TINY, other), random_tokens(TINY, 1, 8))
    assert not report.equal
    assert [(f.fault, f.place) for f in report.findings] == [("rounding", "weights")]
    assert "last bits" in report.findings[0].says


@pytest.mark.parametrize("name", ["gqa", "mha"])
def test_queries_that_no_fault_explains(name: str, float64: Tier) -> None:
    """Pairs of faults are tried, of shapes that do not go together too."""
    config = MODELS[name]

    def noisy(*arguments: Any) -> Trace:
        trace, stage = BACKENDS["torch"].trace(*arguments), "model.layers.0.self_attn.q"
        return replace(trace, stages=trace.stages | {stage: 1.37 * trace.stages[stage] + 0.1})

    right = subject("torch", config, random_weights(config))
    report = report_of(right, replace(right, run=noisy), random_tokens(config, 1, 32))
    assert [(f.fault, f.subject) for f in report.findings if "q" in f.says] == [("unknown", "B")]


def test_a_reader_that_forgets_theta_and_scaling(float64: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two faults at one stage are told apart, though other pairs would not fit the heads."""
    plant(monkeypatch, "torch", "weights.rope_table", table_of(rope_theta=10_000.0, rope_scaling=None))
    weights = random_weights(CONFIG)
    report = report_of(subject("jax", CONFIG, weights), subject("torch", CONFIG, weights))
    assert {(f.fault, f.subject) for f in report.findings} == {("rope-theta, rope-scaling", "B")}
