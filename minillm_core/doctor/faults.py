"""The known faults of ports, each as a change of the reference model. Applied to a correct model, it reproduces the
numbers that a faulty port computes."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from minillm_core.config import ModelConfig, RopeScaling
from minillm_core.errors import InputError
from minillm_core.model.params import param_table
from minillm_core.model.reference import Reference
from minillm_core.model.rope import half_split, interleaved, inverse_frequencies
from minillm_core.tensors import LazyTensors

Variant = tuple[str, Reference]
"""The fault in words, and a model that has it."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault, and the forms in which it occurs."""

    name: str
    variants: Callable[[Reference, ModelConfig], Iterator[Variant]]
    """(model, hints) -> the model with each form of the fault. `hints` is the configuration of the model that may have
    the fault: its values are tried first."""


def _change(model: Reference, suffixes: tuple[str, ...], change: Callable[[np.ndarray], np.ndarray]) -> Reference:
    """The model with every weight changed whose name ends in one of the suffixes."""
    weights = model.weights

    def changed(name: str) -> np.ndarray:
        return change(weights[name]) if name.removesuffix(".weight").endswith(suffixes) else weights[name]

    return replace(model, weights=LazyTensors(weights, changed))


def _swap(model: Reference, one: str, other: str) -> Reference:
    """The model with two weights swapped in every layer."""
    weights = model.weights

    def changed(name: str) -> np.ndarray:
        for a, b in ((one, other), (other, one)):
            if f".{a}." in name:
                return weights[name.replace(f".{a}.", f".{b}.")]
        return weights[name]

    return replace(model, weights=LazyTensors(weights, changed))


def _interleaved_rope(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    H = model.config.resolved_head_dim

    def rotation(x_BTNH: np.ndarray, cos_T1H: np.ndarray, sin_T1H: np.ndarray) -> np.ndarray:
        even, odd = x_BTNH[..., ::2], x_BTNH[..., 1::2]
        turned = np.stack([even * cos_T1H - odd * sin_T1H, odd * cos_T1H + even * sin_T1H], axis=-1)
        return turned.reshape(x_BTNH.shape)

    qk = ("q_proj", "k_proj")
    yield (
        "q and k are stored for interleaved RoPE (channels 2i and 2i+1)",
        _change(model, qk, lambda w: interleaved(w, H)),
    )
    yield (
        "q and k were converted to half-split although they already were",
        _change(model, qk, lambda w: half_split(w, H)),
    )
    yield "RoPE rotates channels 2i and 2i+1, but the weights are half-split", replace(model, rotation=rotation)


def _rope_direction(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    yield "RoPE rotates in the wrong direction", replace(model, frequencies=lambda config: -model.frequencies(config))
    yield "RoPE is missing", replace(model, frequencies=lambda config: 0 * model.frequencies(config))

    def halves_swapped(weight_OI: np.ndarray) -> np.ndarray:
        first, second = np.split(weight_OI.reshape(-1, model.config.resolved_head_dim, weight_OI.shape[1]), 2, axis=1)
        return np.concatenate([second, first], axis=1).reshape(weight_OI.shape)

    yield "the halves of each head of q and k are swapped", _change(model, ("q_proj", "k_proj"), halves_swapped)


def _rope_theta(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    for theta in dict.fromkeys((hints.rope_theta, 10_000.0, 500_000.0, 1e6, 100_000.0, 1_000.0)):
        if theta != model.config.rope_theta:
            config = replace(model.config, rope_theta=theta)
            yield f"rope_theta is {theta:g}, not {model.config.rope_theta:g}", replace(model, config=config)


def _rope_scaling(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    scaling = model.config.rope_scaling
    llama3 = (RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192))
    for form in dict.fromkeys((None, hints.rope_scaling, *llama3)):
        if form != scaling:
            says = "rope_scaling is missing" if form is None else f"rope_scaling is {form}, not {scaling}"
            yield says, replace(model, config=replace(model.config, rope_scaling=form))
    if scaling is not None:
        factor = scaling.factor

        def linear(config: ModelConfig) -> np.ndarray:
            return inverse_frequencies(replace(config, rope_scaling=None)) / factor

        yield (
            "rope_scaling is applied as linear scaling: every angle is divided by its factor",
            replace(model, frequencies=linear),
        )


def _norm_eps(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    for eps in dict.fromkeys((hints.norm_eps, 1e-5, 1e-6, 1e-8, 1e-12)):
        if eps != model.config.norm_eps:
            config = replace(model.config, norm_eps=eps)
            yield f"norm_eps is {eps:g}, not {model.config.norm_eps:g}", replace(model, config=config)


def _head_shape(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    """Different numbers of heads that give weights of the same shapes."""
    config = model.config
    Q, KV = config.n_heads * config.resolved_head_dim, config.n_kv_heads * config.resolved_head_dim
    for H in dict.fromkeys((hints.resolved_head_dim, 64, 128, 32, 96, 80)):
        if config.resolved_head_dim != H and Q % H == 0 and KV % H == 0:
            says = f"head_dim is {H} ({Q // H} query and {KV // H} KV heads), not {config.resolved_head_dim}"
            try:
                yield says, replace(model, config=replace(config, n_heads=Q // H, n_kv_heads=KV // H, head_dim=H))
            except InputError:
                continue


def _head_groups(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    if 1 < model.config.n_kv_heads < model.config.n_heads:
        yield (
            "the KV heads are tiled, not repeated: query head n reads KV head n % n_kv_heads",
            replace(model, tiled_groups=True),
        )


def _head(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    weights, tied = model.weights, model.config.tie_embeddings
    if not tied:
        config = replace(model.config, tie_embeddings=True)
        yield (
            "the output head is the embedding, and the model's own output matrix is not used",
            replace(model, config=config),
        )
    elif "lm_head.weight" in weights:
        config = replace(model.config, tie_embeddings=False)
        yield "the output head is a separate matrix, not the embedding", replace(model, config=config)


def _transposed(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    square = [name for name, spec in param_table(model.config).items() if len(set(spec.shape)) == 1 < len(spec.shape)]
    for kind in dict.fromkeys(name.split(".")[-2] for name in square):
        yield f"{kind} is transposed", _change(model, (kind,), np.transpose)


def _swapped(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    pairs = [("gate_proj", "up_proj"), ("k_proj", "v_proj"), ("input_layernorm", "post_attention_layernorm")]
    table = param_table(model.config)
    pairs += [("q_proj", "k_proj"), ("q_proj", "v_proj"), ("q_proj", "o_proj")]
    for one, other_one in pairs:
        shapes = {spec.shape for name, spec in table.items() if name.split(".")[-2] in (one, other_one)}
        if len(shapes) == 1:
            yield f"{one} and {other_one} are swapped", _swap(model, one, other_one)


def layer_orders(n_layers: int) -> dict[str, list[int]]:
    """Known wrong orders of the layers, by description: for each layer, the layer whose weights it has."""
    return {
        "sorted as text: 0, 1, 10, 11 ... 2": sorted(range(n_layers), key=str),
        "reversed": list(range(n_layers))[::-1],
        "shifted by one": [*range(1, n_layers), 0],
    }


def _layer_order(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    for how, order in layer_orders(model.config.n_layers).items():
        if order != sorted(order):

            def moved(name: str, order: list[int] = order) -> np.ndarray:
                name = re.sub(r"(?<=^model\.layers\.)\d+", lambda layer: str(order[int(layer[0])]), name)
                return model.weights[name]

            says = f"the layers are in the wrong order ({how})"
            yield says, replace(model, weights=LazyTensors(model.weights, moved))


def _norm_weights(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    yield (
        "norm weights are stored as w - 1 (as in Gemma)",
        _change(model, ("norm",), lambda w: w.astype(np.float64) - 1),
    )
    yield (
        "norm weights are applied as 1 + w (as in Gemma)",
        _change(model, ("norm",), lambda w: w.astype(np.float64) + 1),
    )
    yield "norm weights are not applied", _change(model, ("norm",), np.ones_like)
    yield "the final norm is missing", replace(model, final_norm=False)


def _scale(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    config = model.config
    for says, scale in (
        ("missing", 1.0),
        ("1 / sqrt(width)", config.width**-0.5),
        ("1 / head_dim", 1 / config.resolved_head_dim),
    ):
        yield f"the attention scale is {says}; it should be 1 / sqrt(head_dim)", replace(model, attention_scale=scale)
    says = "the embedding is multiplied by sqrt(width) (as in Gemma)"
    yield says, replace(model, embedding_scale=math.sqrt(config.width))


def _activation(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    def tanh_gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    erf = np.vectorize(math.erf, otypes=[np.float64])
    yield "the MLP's activation is gelu, not silu", replace(model, activation=lambda x: 0.5 * x * (1 + erf(x / 2**0.5)))
    yield "the MLP's activation is gelu (tanh approximation), not silu", replace(model, activation=tanh_gelu)
    yield "the MLP's activation is relu, not silu", replace(model, activation=lambda x: np.maximum(x, 0))


def _mask(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    yield "the causal mask is missing: attention sees later tokens", replace(model, sees_future=True)


def _window(model: Reference, hints: ModelConfig) -> Iterator[Variant]:
    window = model.config.sliding_window
    near = (window - 1, window + 1) if window is not None else ()
    for other in dict.fromkeys((hints.sliding_window, None, *near)):
        if other != window and other != 0:
            says = f"the sliding window is {other or 'missing'}; it should be {window or 'absent'}"
            yield says, replace(model, config=replace(model.config, sliding_window=other))


FAULTS = (
    Fault("rope-layout", _interleaved_rope),
    Fault("rope-direction", _rope_direction),
    Fault("rope-theta", _rope_theta),
    Fault("rope-scaling", _rope_scaling),
    Fault("norm-eps", _norm_eps),
    Fault("head-shape", _head_shape),
    Fault("head-groups", _head_groups),
    Fault("tied-head", _head),
    Fault("transposed", _transposed),
    Fault("swapped", _swapped),
    Fault("layer-order", _layer_order),
    Fault("norm-weights", _norm_weights),
    Fault("scale", _scale),
    Fault("causal-mask", _mask),
    Fault("sliding-window", _window),
    Fault("activation", _activation),
)
"""In the order in which they are tried: if two faults explain the same numbers, the first one is named."""
