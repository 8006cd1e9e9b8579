"""Why two models differ: which known faults, planted in the one, give the other's numbers, in float64.

Each model is first held against the reference of its own files: where it leaves that, the code that runs it is wrong.
What differs between the files is then looked for in the weights and in the configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from minillm_core.backend import Trace
from minillm_core.config import ModelConfig
from minillm_core.faults import FAULTS
from minillm_core.params import param_table
from minillm_core.reference import Reference
from minillm_core.subjects import Subject
from minillm_core.tolerance import TOLERANCES

MAX_FAULTS = 4
"""Faults of one model that are looked for, one after the other."""
BOUND = 100 * TOLERANCES["float64"].logits
"""Relative error from which on a stage is wrong: rounding alone stays far below, however many layers amplify it, and a
cast to float32 is far above."""
NEAR = 0.02
"""Relative norm of the difference up to which two weights are one but for rounding: bfloat16 gives 0.0017 of normal
numbers, q8_0 0.005."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Stages = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Divergence:
    """The first stage at which two models differ, and by how much relative to its largest value."""

    index: int
    """Among all stages; their number if none differs."""
    stage: str | None
    error: float
    """Of that stage; of all if none differs."""

    def __str__(self) -> str:
        return f"{self.stage or 'all stages agree'} ({self.error:.1e})"


@dataclass(frozen=True)
class Finding:
    """A fault that explains a difference."""

    fault: str
    """A name of FAULTS; or `rounding` of weights, `cast` of what is computed, `gradient`, `unknown`."""
    subject: str
    """Which model has it: A or B. Files tell only that they differ: then B is said to have it."""
    place: str
    """`weights`, `configuration` or `code`."""
    says: str
    evidence: str


def diagnose(a: Subject, b: Subject, ours: Trace, theirs: Trace, tokens_BT: np.ndarray) -> list[Finding]:
    """What is wrong, as far as it is known, in the order in which it was found; both traces in float64."""
    findings = []
    for name, subject, trace in (("A", a, ours), ("B", b, theirs)):
        own = Reference(subject.config, subject.weights)
        findings += _search(own, subject.config, trace.stages, tokens_BT, name, "code")
    findings += _explain_weights(a, b)
    config = replace(a.config, context_length=b.config.context_length, tie_embeddings=b.config.tie_embeddings)
    if config != b.config:
        target = dict(Reference(b.config, b.weights).stages(tokens_BT))
        model = Reference(config, b.weights)
        findings += _search(model, b.config, target, tokens_BT, "B", "configuration")
    return findings or _explain_gradients(a, ours, theirs, tokens_BT)


def divergence(model: Reference, tokens_BT: np.ndarray, stages: Stages) -> Divergence:
    """The first of the given stages that is not the reference's; nothing after it is computed."""
    largest = 0.0
    with np.errstate(all="ignore"):  # of a wrong model anything may come
        for index, (name, expected) in enumerate(model.stages(tokens_BT)):
            found = stages[name]
            apart = np.where(np.isnan(found) & np.isnan(expected), 0, np.abs(found - expected))  # both may be broken
            error = float(apart.max() / max(1.0, np.nanmax(np.abs(expected), initial=0)))
            if not error <= BOUND:
                return Divergence(index, name, error)
            largest = max(largest, error)
    return Divergence(len(stages), None, largest)


def _search(
    model: Reference, hints: ModelConfig, stages: Stages, tokens_BT: np.ndarray, subject: str, place: str
) -> list[Finding]:
    """The faults which, planted in `model` one after the other, give these stages."""
    findings: list[Finding] = []
    first = divergence(model, tokens_BT, stages)
    while first.stage is not None and len(findings) < MAX_FAULTS:
        best, latest = None, first
        for fault in FAULTS:
            for says, variant in fault.variants(model, hints):
                after = divergence(variant, tokens_BT, stages)
                if after.index > latest.index:
                    best, latest = (fault.name, says, variant), after
            if latest.stage is None:
                break
        if best is None:
            return [*findings, _cast(stages, first, subject, place)]
        name, says, model = best
        findings.append(Finding(name, subject, place, says, f"without it {first} differs first; with it {latest}"))
        first = latest
    return findings


def _cast(stages: Stages, first: Divergence, subject: str, place: str) -> Finding:
    """No known fault: perhaps a cast, which leaves numbers of few bits, or an error of the size of its rounding."""
    value = stages[str(first.stage)]
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)):
        if np.array_equal(value.astype(dtype).astype(np.float64), value):
            evidence = f"each of its numbers is one of {name}; first difference {first}"
            return Finding("cast", subject, place, f"{first.stage} is computed in {name}", evidence)
    for name, unit in (("float32", 2.0**-24), ("bfloat16", 2.0**-9)):
        if unit / 64 <= first.error <= unit * 64:
            evidence = f"an error of the size of {name}'s rounding, {first}, and no other fault explains it"
            return Finding("cast", subject, place, f"{first.stage} passes through {name}", evidence)
    return Finding("unknown", subject, place, "no known fault explains the difference", f"the first is {first}")


def _explain_weights(a: Subject, b: Subject) -> list[Finding]:
    """For every weight that differs the fault that makes A's into B's, up to rounding."""
    model = Reference(a.config, a.weights)
    variants = [("", "", model)]
    variants += [(fault.name, says, made) for fault in FAULTS for says, made in fault.variants(model, b.config)]
    explained: dict[tuple[str, str], list[str]] = {}
    unknown: dict[str, float] = {}
    for name in param_table(a.config):
        if name not in b.weights or np.array_equal(a.weights[name], b.weights[name]):
            continue
        theirs = b.weights[name].astype(np.float64)
        forms = [(fault, says, made.weights[name].astype(np.float64)) for fault, says, made in variants]
        forms += _heads_moved(a, name, theirs)
        fault, says, ours = min(forms, key=lambda form: _distance(form[2], theirs))
        if not _distance(ours, theirs) <= NEAR:  # NaN is near to nothing
            unknown[name] = _distance(forms[0][2], theirs)
            continue
        if fault:
            explained.setdefault((fault, says), []).append(name)
        if not np.array_equal(ours.astype(b.weights[name].dtype), theirs):
            formats = (form for form, value in _rounded(ours).items() if np.array_equal(value, theirs))
            says = f"the weights are rounded to {next(formats, 'fewer bits')}"
            explained.setdefault(("rounding", says), []).append(name)
    findings = [
        Finding(fault, "B", "weights", says, f"so planted in A, {_names(names)} gives B's")
        for (fault, says), names in explained.items()
    ]
    if unknown:
        worst = max(unknown, key=lambda name: unknown[name])
        evidence = f"{_names(list(unknown))}; most in {worst}, by {unknown[worst]:.1e} of its norm"
        findings.append(Finding("unknown", "B", "weights", "weights differ, and no known fault explains it", evidence))
    return findings + _explain_head(a, b)


def _explain_head(a: Subject, b: Subject) -> list[Finding]:
    """One model is tied and the other has another matrix for its head."""
    if a.config.tie_embeddings == b.config.tie_embeddings:
        return []
    untied = b if a.config.tie_embeddings else a
    distance = _distance(untied.weights[EMBEDDING].astype(np.float64), untied.weights[HEAD].astype(np.float64))
    if not distance:
        return []
    says = "the output head is a matrix of its own" if untied is b else "the output head is the embedding"
    evidence = f"{HEAD} is in {'B' if untied is b else 'A'} alone, and differs from the embedding by {distance:.1e}"
    return [Finding("tied-head", "B", "configuration", says, f"{evidence} of its norm")]


def _heads_moved(a: Subject, name: str, theirs: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """A's heads in the order in which B seems to have them, if that is another one."""
    kind, ours = name.split(".")[-2], a.weights[name].astype(np.float64)
    if kind not in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return []
    one, other = (ours.T, theirs.T) if kind == "o_proj" else (ours, theirs)
    one_NHI, other_NHI = (x.reshape(-1, a.config.resolved_head_dim, x.shape[1]) for x in (one, other))
    order = [min(range(len(one_NHI)), key=lambda n: np.linalg.norm(one_NHI[n] - head_HI)) for head_HI in other_NHI]
    if order == sorted(order):
        return []
    moved = one_NHI[order].reshape(one.shape)
    return [("head-order", f"the heads of {kind} are in the order {order}", moved.T if kind == "o_proj" else moved)]


def _explain_gradients(a: Subject, ours: Trace, theirs: Trace, tokens_BT: np.ndarray) -> list[Finding]:
    """The forward passes are one; perhaps the gradients are not."""
    ratios = [
        np.linalg.norm(theirs.gradients[name]) / np.linalg.norm(ours.gradients[name])
        for name in ours.gradients
        if name in theirs.gradients and np.any(ours.gradients[name])
    ]
    wrong = [name for name in theirs.gradients if _distance(ours.gradients[name], theirs.gradients[name]) > BOUND]
    if not wrong:
        says = "nothing but rounding, which in float64 stays below a hundred times the tolerance"
        return [Finding("rounding", "B", "code", says, "every stage and every gradient agrees so far")]
    if max(ratios) - min(ratios) <= BOUND * max(ratios):
        says = f"every gradient is {np.mean(ratios):.6g} times what it should be"
        return [Finding("gradient", "B", "code", says, f"the ratios of norms agree to {max(ratios) - min(ratios):.0e}")]
    if a.config.tie_embeddings and wrong == [EMBEDDING]:
        untied, copy = replace(a.config, tie_embeddings=False), {HEAD: a.weights[EMBEDDING]}
        parts = a.run(untied, a.weights | copy, tokens_BT, "float64").gradients
        for name, missing in ((EMBEDDING, "the output head's"), (HEAD, "the look-up's")):
            if name in parts and _distance(parts[name], theirs.gradients[EMBEDDING]) <= BOUND:
                says = f"{missing} part of the embedding's gradient is missing"
                return [Finding("gradient", "B", "code", says, "without it A's gradient is B's")]
    return [Finding("gradient", "B", "code", "the forward passes agree, gradients do not", _names(wrong))]


def _rounded(array: np.ndarray) -> dict[str, np.ndarray]:
    """An array in the formats that weights are kept in."""
    types = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        forms = {name: array.astype(dtype).astype(np.float64) for name, dtype in types.items()}
        if array.shape[-1] % 32 == 0:  # blocks of 32 whole numbers with one scale, as in GGUF
            blocks = array.astype(np.float32).reshape(-1, 32)
            scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
            whole = np.where(scale == 0, np.float32(0), blocks * (1 / scale))
            whole = np.trunc(np.abs(whole) + np.float32(0.5)) * np.sign(whole)
            quantised = whole * scale.astype(np.float16).astype(np.float32)
            forms["q8_0"] = quantised.reshape(array.shape).astype(np.float64)
    return forms


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm; far for other shapes."""
    if ours.shape != theirs.shape:
        return np.inf
    return float(np.linalg.norm(theirs - ours) / max(np.linalg.norm(ours), np.finfo(np.float64).tiny))


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"each of {len(names)} tensors ({names[0]} to {names[-1]})"
