"""Diagnosis: finds the known faults that explain why two models differ, in float64.

Each model is first compared with the reference that is built from its own files: if they differ, the code that runs the
model is wrong. Differences between the files of A and B are looked for in the weights and in the configuration.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.doctor.faults import FAULTS
from minillm_core.doctor.findings import BOUND, Finding, distance, names_of
from minillm_core.doctor.subjects import Subject
from minillm_core.doctor.weights import EMBEDDING, HEAD, Variants, explain_head, explain_weights
from minillm_core.model.reference import Reference, token_losses
from minillm_core.model.stages import Trace, stage_names
from minillm_core.progress import progress, steps

Stages = Mapping[str, np.ndarray]


def diagnose(
    a: Subject, b: Subject, ours: Trace, theirs: Trace, tokens_BT: np.ndarray, findings: list[Finding]
) -> list[Finding]:
    """All findings that explain the difference. Gradients are examined only if nothing else was found.

    Args:
        ours, theirs: what A and B compute, in float64.
        findings: the results of `check_code` for both models.
    """
    findings = [*findings, *explain_weights(a, b), *explain_head(a, b), *_explain_configuration(a, b, tokens_BT)]
    return findings or _explain_gradients(a, b, ours, theirs, tokens_BT)


def check_code(name: str, subject: Subject, trace: Trace, tokens_BT: np.ndarray) -> list[Finding]:
    """Checks whether a model computes, in float64, what its own files say, and finds the faults that explain errors.

    Every stage is recomputed from the model's own values of the previous stages, so a fault shows only where it is.
    """
    model, stages = Reference(subject.config, subject.weights), trace.stages
    right, errors = {}, {}
    for stage in steps([*stages], f"checking the code of {name}", "stage"):
        right[stage] = _stage(model, stage, stages, tokens_BT)
        errors[stage] = _error(stages[stage], right[stage])
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
                f"with this fault applied, the reference reproduces {name} ({names_of(explained, 'stage')}); "
                f"without it, the error is up to {worst:.1e}"
            )
            findings.append(Finding(found[0], name, "code", found[1], evidence))
        wrong = [stage for stage in wrong if stage not in explained]
    if not (error := _error(trace.losses_BT, token_losses(stages["logits"], tokens_BT))) <= BOUND:
        evidence = f"the error is {error:.1e}"
        findings.append(Finding("loss", name, "code", "the losses do not follow from the logits", evidence))
    return findings


def _explaining(
    variants: Variants, stage: str, right: np.ndarray, stages: Stages, tokens_BT: np.ndarray, config: ModelConfig
) -> Iterator[tuple[str, str, Reference]]:
    """The variants that reproduce a wrong stage. If there are none: pairs of faults that reproduce it together."""
    changing: Variants = []
    n_found = 0
    for fault, says, variant in steps(variants, f"trying known faults: {stage}", "fault"):
        value = _stage(variant, stage, stages, tokens_BT)
        if _error(stages[stage], value) <= BOUND:
            n_found += 1
            yield fault, says, variant
        elif value.shape == right.shape and not np.array_equal(value, right):
            changing.append((fault, says, variant))
    if n_found:
        return
    names = {fault for fault, _, _ in changing}
    for fault, says, variant in steps(changing, f"trying pairs: {stage}", "fault"):
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
    window = f"{y.sliding_window or 'missing'}; it should be {x.sliding_window or 'absent'}"
    fields: list[tuple[str, str, dict[str, Any]]] = [
        ("norm-eps", f"norm_eps is {y.norm_eps:g}, not {x.norm_eps:g}", {"norm_eps": x.norm_eps}),
        ("rope-theta", f"rope_theta is {y.rope_theta:g}, not {x.rope_theta:g}", {"rope_theta": x.rope_theta}),
        ("rope-scaling", f"rope_scaling is {scaling}", {"rope_scaling": x.rope_scaling}),
        ("sliding-window", f"the sliding window is {window}", {"sliding_window": x.sliding_window}),
        ("head-shape", says, heads),
    ]
    findings = []
    for fault, says, change in fields:
        config = replace(y, **change)
        if config == replace(y, head_dim=y.resolved_head_dim if fault == "head-shape" else y.head_dim):
            continue
        if first := _first_change(Reference(y, b.weights), Reference(config, b.weights), tokens_BT):
            evidence = f"if B gets A's value, the first stage that changes is {first[0]}, by {first[1]:.1e}"
            findings.append(Finding(fault, "B", "configuration", says, evidence))
    return findings


def _first_change(one: Reference, other: Reference, tokens_BT: np.ndarray) -> tuple[str, float] | None:
    """The first stage that differs between two models, and its error."""
    with progress("comparing the configurations", len(stage_names(one.config)), "stage") as work:
        for (name, value), (_, changed) in zip(one.stages(tokens_BT), other.stages(tokens_BT), strict=True):
            work.advance()
            if (error := _error(value, changed)) > BOUND:
                work.finish()
                return name, error
    return None


def _explain_gradients(a: Subject, b: Subject, ours: Trace, theirs: Trace, tokens_BT: np.ndarray) -> list[Finding]:
    """Compares the gradients of two models whose forward passes agree. If they differ, the loss is measured along the
    difference, to see which model has the wrong gradients."""
    pairs = {
        name: (ours.gradients[name], theirs.gradients[name]) for name in ours.gradients if name in theirs.gradients
    }
    wrong = [name for name, (x, y) in pairs.items() if distance(x, y) > BOUND]
    if not wrong:
        return []
    direction = {name: (pairs[name][1] - pairs[name][0]).astype(np.float64) for name in wrong}
    step = 1e-4 / max(np.abs(x).max() for x in direction.values())

    def loss(sign: int) -> float:
        weights = {name: a.weights[name] + sign * step * direction.get(name, 0) for name in a.weights}
        value = np.empty(0)
        for _, value in Reference(a.config, weights).stages(tokens_BT):  # noqa: B007 (the last one: the logits)
            work.advance()
        return float(np.mean(token_losses(value, tokens_BT)))

    with progress("measuring the slope of the loss", 2 * len(stage_names(a.config)), "stage") as work:
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
        distance(r * right.gradients[n], false.gradients[n]) <= BOUND for r, n in zip(ratios, wrong, strict=True)
    )
    if straight and max(ratios) - min(ratios) <= BOUND * max(map(abs, ratios)):
        return finding(f"the gradients are {np.mean(ratios):.6g} times what they should be ({names_of(wrong)})")
    subject = a if blamed == "B" else b
    if subject.config.tie_embeddings and wrong == [EMBEDDING]:
        untied, copy = replace(subject.config, tie_embeddings=False), {HEAD: subject.weights[EMBEDDING]}
        parts = subject.run(untied, subject.weights | copy, tokens_BT, "float64").gradients
        for name, missing in ((EMBEDDING, "the output head's"), (HEAD, "the token lookup's")):
            if name in parts and distance(parts[name], false.gradients[EMBEDDING]) <= BOUND:
                return finding(f"{missing} part of the embedding's gradient is missing")
    return finding(f"the forward passes agree, but the gradients do not ({names_of(wrong)})")
