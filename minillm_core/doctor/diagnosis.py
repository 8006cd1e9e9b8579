"""Diagnosis: finds the known faults that explain why two models differ, in float64.

Each model is first compared with the reference that is built from its own files: if they differ, the code that runs the
model is wrong. Differences between the files of A and B are looked for in the weights and in the configuration.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.doctor.faults import FAULTS, layer_orders
from minillm_core.doctor.subjects import Subject
from minillm_core.model.params import param_table
from minillm_core.model.reference import Reference
from minillm_core.model.stages import Trace
from minillm_core.model.tolerance import TOLERANCES

BOUND = 100 * TOLERANCES["float64"].logits
"""A stage is wrong if its largest error, relative to its largest value, is above this bound. Each stage is recomputed
from the model's own values of the previous stages, so rounding errors do not accumulate. A cast to float32 gives 1e-8
and more."""
NEAR = 0.02
"""Largest relative norm of the difference at which two weights can be equal up to rounding. For normally distributed
numbers bfloat16 gives 0.0017, and q8_0 gives 0.005."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Stages = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Finding:
    """A fault that explains a difference."""

    fault: str
    """A name in `FAULTS` (or two, if only a pair explains the numbers); or `head-order`, `row-order` or `rounding` of
    weights; `cast` (a stage computed in a lower precision), `loss`, `gradient`, `unknown`."""
    subject: str
    """The faulty model, `A` or `B`. Files only show that they differ, so findings in files name B, compared with A."""
    place: str
    """`weights`, `configuration` or `code`."""
    says: str
    evidence: str


def diagnose(
    a: Subject, b: Subject, ours: Trace, theirs: Trace, tokens_BT: np.ndarray, findings: list[Finding]
) -> list[Finding]:
    """All findings that explain the difference. Gradients are examined only if nothing else was found.

    Args:
        ours, theirs: what A and B compute, in float64.
        findings: the results of `check_code` for both models.
    """
    findings = [*findings, *_explain_weights(a, b), *_explain_head(a, b), *_explain_configuration(a, b, tokens_BT)]
    return findings or _explain_gradients(a, b, ours, theirs, tokens_BT)


def check_code(name: str, subject: Subject, trace: Trace, tokens_BT: np.ndarray) -> list[Finding]:
    """Checks whether a model computes, in float64, what its own files say, and finds the faults that explain errors.

    Every stage is recomputed from the model's own values of the previous stages, so a fault shows only where it is.
    """
    model, stages = Reference(subject.config, subject.weights), trace.stages
    right = {stage: _stage(model, stage, stages, tokens_BT) for stage in stages}
    errors = {stage: _error(stages[stage], right[stage]) for stage in stages}
    wrong = [stage for stage, error in errors.items() if not error <= BOUND]
    findings = []
    variants = [(fault.name, *form) for fault in FAULTS for form in fault.variants(model, subject.config)]
    while wrong:
        explained: list[str] = []
        for fault, says, variant in _explaining(variants, wrong[0], right[wrong[0]], stages, tokens_BT, subject.config):
            same = [wrong[0], *(stage for stage in wrong[1:] if _agrees(variant, stage, stages, tokens_BT))]
            if len(same) > len(explained):
                explained, found = same, (fault, says)
            if explained == wrong:
                break
        if not explained:
            findings.append(_cast(name, wrong[0], stages[wrong[0]], right[wrong[0]]))
            explained = [stage for stage in wrong if _kind(stage) == _kind(wrong[0])]
        else:
            worst = max(errors[stage] for stage in explained)
            evidence = (
                f"with this fault applied, the reference reproduces {name} ({_names(explained, 'stage')}); "
                f"without it, the error is up to {worst:.1e}"
            )
            findings.append(Finding(found[0], name, "code", found[1], evidence))
        wrong = [stage for stage in wrong if stage not in explained]
    if not (error := _error(trace.losses_BT, _losses(stages["logits"], tokens_BT))) <= BOUND:
        evidence = f"the error is {error:.1e}"
        findings.append(Finding("loss", name, "code", "the losses do not follow from the logits", evidence))
    return findings


Variants = list[tuple[str, str, Reference]]


def _explaining(
    variants: Variants, stage: str, right: np.ndarray, stages: Stages, tokens_BT: np.ndarray, config: ModelConfig
) -> Iterator[tuple[str, str, Reference]]:
    """The variants that reproduce a wrong stage. If there are none: pairs of faults that reproduce it together."""
    changing: Variants = []
    n_found = 0
    for fault, says, variant in variants:
        value = _stage(variant, stage, stages, tokens_BT)
        if _error(stages[stage], value) <= BOUND:
            n_found += 1
            yield fault, says, variant
        elif value.shape == right.shape and not np.array_equal(value, right):
            changing.append((fault, says, variant))
    if n_found:
        return
    names = {fault for fault, _, _ in changing}
    for fault, says, variant in changing:
        for second in FAULTS:
            if second.name != fault and second.name in names:
                for more, both in second.variants(variant, config):
                    if _agrees(both, stage, stages, tokens_BT):
                        yield f"{fault}, {second.name}", f"{says}; {more}", both


def _stage(model: Reference, stage: str, stages: Stages, tokens_BT: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):  # a faulty model may overflow or give NaN
        return model.stage(stage, stages, tokens_BT)


def _agrees(model: Reference, stage: str, stages: Stages, tokens_BT: np.ndarray) -> bool:
    return _error(stages[stage], _stage(model, stage, stages, tokens_BT)) <= BOUND


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest error over the largest expected value (absolute if that is 0). NaN where NaN is expected is no error."""
    with np.errstate(all="ignore"):
        apart = np.where(np.isnan(found) & np.isnan(expected), 0, np.abs(found - expected)).max()
        largest = np.nanmax(np.abs(expected), initial=0)
        return float(apart / largest if largest else apart)


def _losses(logits_BTV: np.ndarray, tokens_BT: np.ndarray) -> np.ndarray:
    """The loss of every token except the first, in nats (B, T - 1)."""
    logits_BTV = logits_BTV[:, :-1]
    chosen_BT = np.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return np.logaddexp.reduce(logits_BTV, axis=-1) - chosen_BT


def _kind(stage: str) -> str:
    return re.sub(r"\d+", "", stage)


def _cast(subject: str, stage: str, found: np.ndarray, right: np.ndarray) -> Finding:
    """The finding for a stage that no known fault explains. It is a cast if every value is a number of a smaller type
    close to the correct value, or if the error has the size of that type's rounding; otherwise it is unknown."""
    error = _error(found, right)
    types = {
        "bfloat16": (ml_dtypes.bfloat16, 2.0**-9),
        "float16": (np.float16, 2.0**-12),
        "float32": (np.float32, 2.0**-25),
    }
    for name, (dtype, unit) in types.items():
        rounded = np.array_equal(found.astype(dtype).astype(np.float64), found)
        if rounded and np.all(np.abs(found - right) <= 4 * unit * np.abs(right)):
            evidence = f"every value is a {name} number close to the correct value"
            return Finding("cast", subject, "code", f"{stage} is rounded to {name}", evidence)
    for name, (_, unit) in types.items():
        if unit / 4 <= error <= 16 * unit:
            evidence = f"the error ({error:.1e}) has the size of {name} rounding, and no other known fault explains it"
            return Finding("cast", subject, "code", f"{stage} is probably computed in {name}", evidence)
    says = f"{stage} is wrong, and no known fault explains it"
    return Finding("unknown", subject, "code", says, f"the error is {error:.1e}")


def _explain_configuration(a: Subject, b: Subject, tokens_BT: np.ndarray) -> list[Finding]:
    """A finding for every configuration field that differs and changes the result. Its evidence is the first stage of B
    that changes if B gets A's value."""
    x, y = a.config, b.config
    heads = {"n_heads": x.n_heads, "n_kv_heads": x.n_kv_heads, "head_dim": x.resolved_head_dim}
    says = (
        f"head_dim is {y.resolved_head_dim} ({y.n_heads} query and {y.n_kv_heads} KV heads), not {x.resolved_head_dim}"
    )
    scaling = "missing" if y.rope_scaling is None else f"{y.rope_scaling}, not {x.rope_scaling}"
    fields: list[tuple[str, str, dict[str, Any]]] = [
        ("norm-eps", f"norm_eps is {y.norm_eps:g}, not {x.norm_eps:g}", {"norm_eps": x.norm_eps}),
        ("rope-theta", f"rope_theta is {y.rope_theta:g}, not {x.rope_theta:g}", {"rope_theta": x.rope_theta}),
        ("rope-scaling", f"rope_scaling is {scaling}", {"rope_scaling": x.rope_scaling}),
        ("head-shape", says, heads),
    ]
    findings = []
    for fault, says, change in fields:
        config = replace(y, **change)
        if config != replace(y, head_dim=y.resolved_head_dim if fault == "head-shape" else y.head_dim):
            pairs = zip(
                Reference(y, b.weights).stages(tokens_BT), Reference(config, b.weights).stages(tokens_BT), strict=True
            )
            changed = ((name, error) for (name, value), (_, other) in pairs if (error := _error(value, other)) > BOUND)
            if first := next(changed, None):
                evidence = f"if B gets A's value, the first stage that changes is {first[0]}, by {first[1]:.1e}"
                findings.append(Finding(fault, "B", "configuration", says, evidence))
    return findings


def _explain_weights(a: Subject, b: Subject) -> list[Finding]:
    """For every weight that differs, finds the fault that turns A's weight into B's, up to rounding."""
    model = Reference(a.config, a.weights)
    variants = [(fault.name, says, made) for fault in FAULTS for says, made in fault.variants(model, b.config)]
    explained: dict[tuple[str, str], list[str]] = {}
    unknown: dict[str, float] = {}
    last_bits: dict[str, float] = {}
    moved: dict[int, int] = {}
    for name in param_table(a.config):
        if name not in b.weights or np.array_equal(a.weights[name], b.weights[name], equal_nan=True):
            continue
        theirs = b.weights[name].astype(np.float64)
        fault, says, ours = min(_forms(a, name, variants, theirs), key=lambda form: _distance(form[2], theirs))
        form = _rounding(ours, theirs, b.weights[name].dtype)
        if not _distance(ours, theirs) <= NEAR or form is None:  # `not <=`: NaN counts as far
            unknown[name] = _distance(a.weights[name].astype(np.float64), theirs)
            continue
        if fault == "layer-order":
            layer, source = map(int, says.split())
            moved[layer], says = source, "layers"
        if not says and not form:
            last_bits[name] = _distance(ours, theirs)
        for key in ((fault, says), ("rounding", form)):
            if key[1]:
                explained.setdefault(key, []).append(name)
    findings = []
    for (fault, says), names in explained.items():
        words = _order(moved, a.config.n_layers) if fault == "layer-order" else says
        evidence = f"applying this change to A reproduces B exactly ({_names(names)})"
        findings.append(Finding(fault, "B", "weights", words, evidence))
    if last_bits:
        evidence = f"difference at most {max(last_bits.values()):.1e} of the norm ({_names(list(last_bits))})"
        findings.append(Finding("rounding", "B", "weights", "weights differ in the last bits of float32", evidence))
    if unknown:
        worst = max(unknown, key=lambda name: unknown[name])
        evidence = f"{_names(list(unknown))}; difference at most {unknown[worst]:.1e} of the norm, in {worst}"
        if a.weights[worst].shape == b.weights[worst].shape:
            rows = np.flatnonzero((a.weights[worst] != b.weights[worst]).reshape(len(a.weights[worst]), -1).any(axis=1))
            evidence += f" (only in rows {rows.tolist()})" if len(rows) <= 8 else ""
        says = "weights differ, and no known fault explains the difference"
        if 2 * len(unknown) > len(a.weights):
            says += "; the weights may come from different models or training steps"
        findings.append(Finding("unknown", "B", "weights", says, evidence))
    return findings


def _order(moved: Mapping[int, int], n_layers: int) -> str:
    """The order of the layers in words. `moved` maps a layer of B to the layer of A whose weights it has."""
    order = [moved.get(layer, layer) for layer in range(n_layers)]
    if how := next((how for how, known in layer_orders(n_layers).items() if known == order), None):
        return f"the layers are in the wrong order ({how})"
    if sorted(order) == list(range(n_layers)):
        return f"the layers are in the order {order}"
    return "; ".join(f"layer {layer} has the weights of A's layer {source}" for layer, source in moved.items())


def _forms(a: Subject, name: str, variants: Variants, theirs: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """A weight of A, unchanged and changed by every known fault: (name of the fault, description, value)."""
    right = a.weights[name]
    yield "", "", right.astype(np.float64)
    for fault, says, made in variants:
        if fault == "layer-order":  # tried below, layer by layer
            continue
        if made.weights is not a.weights and (changed := made.weights[name]) is not right:
            yield fault, says, changed.astype(np.float64)
    yield from _heads_moved(a, name, theirs)
    for layer in range(a.config.n_layers):
        other = re.sub(r"(?<=^model\.layers\.)\d+", str(layer), name)
        if other != name:
            yield "layer-order", f"{re.findall(r'[0-9]+', name)[0]} {layer}", a.weights[other].astype(np.float64)
    if right.shape == theirs.shape:
        yield from _scaled_or_shifted(name, right.astype(np.float64), theirs)


def _scaled_or_shifted(name: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """A weight scaled to be as close to B's as possible; rows of the vocabulary shifted by one, in either direction."""
    ratio = float(np.vdot(ours, theirs) / max(np.vdot(ours, ours), np.finfo(np.float64).tiny))
    if not abs(ratio - 1) <= 5e-4:  # rounding changes the ratio by less
        yield "scale", f"{name.split('.')[-2]} is multiplied by {ratio:.5g}", ratio * ours
    if name in (EMBEDDING, HEAD):
        for step, edge in ((1, 0), (-1, -1)):
            moved = np.roll(ours, step, axis=0)
            moved[edge] = theirs[edge]
            yield "row-order", f"the rows of the vocabulary are shifted by {step:+d}", moved


def _rounding(ours: np.ndarray, theirs: np.ndarray, dtype: np.dtype) -> str | None:
    """Whether two close weights are equal up to rounding: "" if up to the last bits of float32, a description if one of
    them is rounded to a storage format, None if neither."""
    if ours.shape == theirs.shape and np.allclose(ours.astype(dtype), theirs, rtol=2.0**-22, atol=2.0**-24):
        return ""
    for whose, (one, other) in {"B's": (ours, theirs), "A's": (theirs, ours)}.items():
        for form, value in _rounded(one).items():
            if np.array_equal(value, other):
                return f"{whose} weights are rounded to {form}"
    return None


def _explain_head(a: Subject, b: Subject) -> list[Finding]:
    """One model is tied, and the other has an output head that differs from its embedding."""
    if a.config.tie_embeddings == b.config.tie_embeddings:
        return []
    untied = b if a.config.tie_embeddings else a
    distance = _distance(untied.weights[EMBEDDING].astype(np.float64), untied.weights[HEAD].astype(np.float64))
    if not distance:
        return []
    says = "the output head is a separate matrix" if untied is b else "the output head is the embedding"
    evidence = f"only {'B' if untied is b else 'A'} has {HEAD}, which differs from the embedding by {distance:.1e}"
    return [Finding("tied-head", "B", "configuration", says, f"{evidence} of its norm")]


def _heads_moved(a: Subject, name: str, theirs: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """A's heads in the order in which B seems to have them; nothing if the order is the same."""
    kind, ours = name.split(".")[-2], a.weights[name].astype(np.float64)
    if kind not in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return []
    one, other = (ours.T, theirs.T) if kind == "o_proj" else (ours, theirs)
    one_NHI, other_NHI = (x.reshape(-1, a.config.resolved_head_dim, x.shape[1]) for x in (one, other))
    order = [min(range(len(one_NHI)), key=lambda n: np.linalg.norm(one_NHI[n] - head_HI)) for head_HI in other_NHI]
    if order == list(range(len(order))):
        return []
    moved = one_NHI[order].reshape(one.shape)
    return [("head-order", f"the heads of {kind} are in the order {order}", moved.T if kind == "o_proj" else moved)]


def _explain_gradients(a: Subject, b: Subject, ours: Trace, theirs: Trace, tokens_BT: np.ndarray) -> list[Finding]:
    """Compares the gradients of two models whose forward passes agree. If they differ, the loss is measured along the
    difference, to see which model has the wrong gradients."""
    pairs = {
        name: (ours.gradients[name], theirs.gradients[name]) for name in ours.gradients if name in theirs.gradients
    }
    wrong = [name for name, (x, y) in pairs.items() if _distance(x, y) > BOUND]
    if not wrong:
        return []
    direction = {name: (pairs[name][1] - pairs[name][0]).astype(np.float64) for name in wrong}
    step = 1e-4 / max(np.abs(x).max() for x in direction.values())

    def loss(sign: int) -> float:
        weights = {name: a.weights[name] + sign * step * direction.get(name, 0) for name in a.weights}
        *_, (_, logits_BTV) = Reference(a.config, weights).stages(tokens_BT)
        return float(np.mean(_losses(logits_BTV, tokens_BT)))

    slope = (loss(1) - loss(-1)) / (2 * step)
    slopes = [sum(float(np.vdot(pairs[name][i], direction[name])) for name in wrong) for i in range(2)]
    blamed = "B" if abs(slopes[0] - slope) < abs(slopes[1] - slope) else "A"
    right, false = (ours, theirs) if blamed == "B" else (theirs, ours)
    measured = (
        f"measured slope of the loss {slope:.6g}; slope by the gradients: {slopes[0]:.6g} in A, {slopes[1]:.6g} in B"
    )

    def finding(says: str) -> list[Finding]:
        return [Finding("gradient", blamed, "code", says, measured)]

    ratios = [
        float(np.vdot(x, y) / np.vdot(x, x)) for x, y in ((right.gradients[n], false.gradients[n]) for n in wrong)
    ]
    straight = all(
        _distance(r * right.gradients[n], false.gradients[n]) <= BOUND for r, n in zip(ratios, wrong, strict=True)
    )
    if straight and max(ratios) - min(ratios) <= BOUND * max(map(abs, ratios)):
        return finding(f"the gradients are {np.mean(ratios):.6g} times what they should be ({_names(wrong)})")
    subject = a if blamed == "B" else b
    if subject.config.tie_embeddings and wrong == [EMBEDDING]:
        untied, copy = replace(subject.config, tie_embeddings=False), {HEAD: subject.weights[EMBEDDING]}
        parts = subject.run(untied, subject.weights | copy, tokens_BT, "float64").gradients
        for name, missing in ((EMBEDDING, "the output head's"), (HEAD, "the token lookup's")):
            if name in parts and _distance(parts[name], false.gradients[EMBEDDING]) <= BOUND:
                return finding(f"{missing} part of the embedding's gradient is missing")
    return finding(f"the forward passes agree, but the gradients do not ({_names(wrong)})")


def _rounded(array: np.ndarray) -> dict[str, np.ndarray]:
    """An array rounded to every format in which weights are stored, by the name of the format."""
    types = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        forms = {name: array.astype(dtype).astype(np.float64) for name, dtype in types.items()}
        if array.shape[-1] % 32 == 0:  # GGUF's q8_0: blocks of 32 integers with one scale
            blocks = array.astype(np.float32).reshape(-1, 32)
            scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
            whole = np.where(scale == 0, np.float32(0), blocks * (1 / scale))
            whole = np.trunc(np.abs(whole) + np.float32(0.5)) * np.sign(whole)
            quantised = whole * scale.astype(np.float16).astype(np.float32)
            forms["q8_0"] = quantised.reshape(array.shape).astype(np.float64)
    return forms


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm of `ours`; infinite if the shapes differ."""
    if ours.shape != theirs.shape:
        return np.inf
    return float(np.linalg.norm(theirs - ours) / max(np.linalg.norm(ours), np.finfo(np.float64).tiny))


def _names(names: list[str], noun: str = "tensor") -> str:
    """`1 tensor: X` or `8 tensors: X to Y`."""
    return f"1 {noun}: {names[0]}" if len(names) == 1 else f"{len(names)} {noun}s: {names[0]} to {names[-1]}"
