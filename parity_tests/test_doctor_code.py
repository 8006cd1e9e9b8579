"""Faults planted in the code of either framework: the doctor names each fault and the model that has it."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from minillm_core.model.stages import Trace
from parity_tests.conftest import (
    BACKENDS,
    MODELS,
    TIERS,
    Tier,
    assert_close,
    random_tokens,
    random_weights,
)
from parity_tests.test_doctor import CONFIG, H, report_of, subject

pytestmark = pytest.mark.extended

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
    """The rotary table of a different configuration."""
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


def no_final_norm(xp: Any, right: Any) -> Any:
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        right(self, *arguments, **options)
        method = "forward" if xp is torch else "__call__"
        self.norm.__class__ = type("NoNorm", (type(self.norm),), {method: lambda norm, x: x})

    return init


def sees_all(xp: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    return q, k, v, xp.zeros_like(mask)


def queries_times(factor: float) -> Make:
    return attention(lambda xp, q, k, v, mask: (q * factor, k, v, mask))


def scaled_embedding(xp: Any, right: Any) -> Any:
    return lambda self, tokens: right(self, tokens) * CONFIG.width**0.5


def tied_head(xp: Any, right: Any) -> Any:
    return lambda self: self.model.embed_tokens.weight if xp is torch else self.model.embed_tokens.embedding[...]


# Faults in code: name -> the doctor's name of the fault, a pattern of its explanation, the function to replace, and the
# maker of its replacement, given the framework's array functions and the correct function.
# fmt: off
CODE: dict[str, tuple[str, str, str, Make]] = {
    "interleaved rotation": ("rope-layout", "2i and 2i", "attention.apply_rope", interleaved_rotation),
    "rotated backwards": ("rope-direction", "wrong direction", "attention.apply_rope", rotation(lambda c, s: (c, -s))),
    "not rotated": ("rope-direction", "missing", "attention.apply_rope", rotation(lambda cos, sin: (cos**0, 0 * sin))),
    "theta forgotten": ("rope-theta", "10000, not", "weights.rope_table", table_of(rope_theta=10_000.0)),
    "rope_scaling forgotten": ("rope-scaling", "missing", "weights.rope_table", table_of(rope_scaling=None)),
    "tiled KV heads": ("head-groups", "n % n_kv_heads", "attention.attend", attention(tiled)),
    "no scale": ("scale", "missing", "attention.attend", queries_times(H**0.5)),
    "scale by width": ("scale", "width", "attention.attend", queries_times((H / CONFIG.width) ** 0.5)),
    "no causal mask": ("causal-mask", "later tokens", "attention.attend", attention(sees_all)),
    "eps forgotten": ("norm-eps", "1e-06, not 1e-05", "layers.RMSNorm.__init__", fixed_eps),
    "through float32": ("cast", "float32", "layers.at_least_float32", lambda xp, right: lambda dtype: xp.float32),
    "gate and up exchanged": ("swapped", "gate_proj and up_proj", "layers.MLP.call", mlp(silu, "up_proj", "gate_proj")),
    "gelu": ("activation", "gelu", "layers.MLP.call", mlp(gelu)),
    "one plus weight": ("norm-weights", r"1 \+ w", "layers.RMSNorm.call", one_plus_weight),
    "scaled embedding": ("scale", "embedding", "layers.Embedding.call", scaled_embedding),
    "no final norm": ("norm-weights", "final norm", "model.Decoder.__init__", no_final_norm),
    "head tied": ("tied-head", "is the embedding", "model.MiniLLM.head_weight", tied_head),
}
# fmt: on


def plant(monkeypatch: pytest.MonkeyPatch, framework: str, place: str, make: Make) -> None:
    module, _, path = place.partition(".")
    owner = __import__(f"minillm_{framework}.{module}", fromlist=["*"])
    *classes, name = path.replace("call", "forward" if framework == "torch" else "__call__").split(".")
    for part in classes:
        owner = getattr(owner, part)
    if (framework, place) == ("torch", "attention.attend"):  # also on a CPU, PyTorch takes a fused kernel where it can
        monkeypatch.setattr(owner, "_kernel_limit", lambda *_: "a planted fault")
    monkeypatch.setattr(owner, name, make(torch if framework == "torch" else jnp, getattr(owner, name)))


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("fault", CODE)
def test_code_faults_are_named(fault: str, framework: str, float64: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    name, words, place, make = CODE[fault]
    theta = CONFIG.rope_theta + (1 + list(CODE).index(fault)) * (framework == "jax")  # so that JAX compiles anew
    config = replace(CONFIG, rope_theta=theta)
    weights, other = random_weights(config), "torch" if framework == "jax" else "jax"
    plant(monkeypatch, framework, place, make)
    if (name, framework) == ("cast", "jax"):  # the softmax as well; torch's is inside scaled_dot_product_attention
        plant(monkeypatch, framework, "attention.at_least_float32", make)
    right, wrong = subject(other, config, weights), subject(framework, config, weights)
    a, b, letter = (right, wrong, "B") if framework == "torch" else (wrong, right, "A")
    report = report_of(a, b)
    assert not report.equal
    assert {(f.fault, f.subject, f.place) for f in report.findings} == {(name, letter, "code")}, report.findings
    assert len(report.findings) == 1 or name == "cast", report.findings  # a cast shows in several stages
    assert re.search(words, report.findings[0].says), report.findings
    if (name, framework) == ("cast", "jax"):
        assert any("self_attn" in finding.says for finding in report.findings), report.findings
    with pytest.raises(AssertionError, match="differs by"):
        assert_close("a sample of the logits", *report.logits, TIERS["float64"].logits)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize(
    ("words", "place", "make"),
    [
        ("output head's part", "model.MiniLLM.head_weight", lambda xp, right: lambda self: stopped(right(self))),
        ("2 times", "tracing.mean_loss", lambda xp, right: lambda model, batch: 2 * right(model, batch)),
    ],
    ids=["head cut off", "scaled"],
)
def test_gradient_faults_are_named(
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


def stopped(head_VD: Any) -> Any:
    """The head's matrix, without a gradient."""
    return head_VD.detach() if isinstance(head_VD, torch.Tensor) else jax.lax.stop_gradient(head_VD)


@pytest.mark.parametrize("framework", BACKENDS)
def test_code_fault_in_one_layer(framework: str, float64: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is named once, with its layer."""
    config = replace(CONFIG, rope_theta=3e4 + (framework == "jax"))
    weights, other = random_weights(config), "torch" if framework == "jax" else "jax"
    calls = iter(range(10**6))

    def in_layer_1(xp: Any, right: Any) -> Any:
        wrong = mlp(silu, "up_proj", "gate_proj")(xp, right)
        return lambda self, x: (wrong if next(calls) % CONFIG.n_layers == 1 else right)(self, x)

    plant(monkeypatch, framework, "layers.MLP.call", in_layer_1)
    report = report_of(subject(other, config, weights), subject(framework, config, weights))
    assert [(f.fault, f.subject) for f in report.findings] == [("swapped", "B")], report.findings
    assert report.findings[0].evidence.startswith(
        "with this fault applied, the reference reproduces B (1 stage: model.layers.1.mlp)"
    )


def test_same_fault_in_both_is_detected(float64: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two models are equal, but neither computes what its files say."""
    config = replace(CONFIG, rope_theta=4e4)
    weights = random_weights(config)
    for framework in BACKENDS:
        plant(monkeypatch, framework, "attention.attend", attention(tiled))
    report = report_of(subject("torch", config, weights), subject("jax", config, weights))
    assert report.equal
    assert [(f.fault, f.subject) for f in report.findings] == [("head-groups", "A"), ("head-groups", "B")]


@pytest.mark.parametrize("name", ["gqa", "mha"])
def test_unexplained_queries_are_reported(name: str, float64: Tier) -> None:
    """The doctor also tries pairs of faults, including pairs whose shapes do not fit together."""
    config = MODELS[name]

    def noisy(*arguments: Any) -> Trace:
        trace, stage = BACKENDS["torch"].trace(*arguments), "model.layers.0.self_attn.q"
        return replace(trace, stages=trace.stages | {stage: 1.37 * trace.stages[stage] + 0.1})

    right = subject("torch", config, random_weights(config))
    report = report_of(right, replace(right, run=noisy), random_tokens(config, 1, 32))
    assert [(f.fault, f.subject) for f in report.findings if "q" in f.says] == [("unknown", "B")]


def test_missing_theta_and_scaling_together(float64: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two faults at the same stage are both named, although some other pairs of faults do not fit the heads."""
    plant(monkeypatch, "torch", "weights.rope_table", table_of(rope_theta=10_000.0, rope_scaling=None))
    weights = random_weights(CONFIG)
    report = report_of(subject("jax", CONFIG, weights), subject("torch", CONFIG, weights))
    assert {(f.fault, f.subject) for f in report.findings} == {("rope-theta, rope-scaling", "B")}
