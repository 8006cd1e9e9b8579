"""Differences between the weights of two checkpoints: the known changes, and roundings, that turn A's into B's."""

import re
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from minillm_core.doctor.faults import FAULTS, layer_orders
from minillm_core.doctor.findings import Finding, distance, names_of
from minillm_core.doctor.subjects import Subject
from minillm_core.model.params import count_params, param_table
from minillm_core.model.reference import Reference
from minillm_core.progress import progress

NEAR = 0.02
"""Largest relative norm of the difference at which two weights can be equal up to rounding. For normally distributed
numbers bfloat16 gives 0.0017, and q8_0 gives 0.005."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Variants = list[tuple[str, str, Reference]]
"""Name of a fault, what would be wrong in words, and the model for which it is true."""


def explain_weights(a: Subject, b: Subject) -> list[Finding]:
    """For every weight that differs, finds the fault that turns A's weight into B's, up to rounding."""
    model = Reference(a.config, a.weights)
    variants = [(fault.name, says, made) for fault in FAULTS for says, made in fault.variants(model, b.config)]
    explained: dict[tuple[str, str], list[str]] = {}
    unknown: dict[str, float] = {}
    last_bits: dict[str, float] = {}
    inexact: dict[str, str] = {}
    """Weights of B that the fault alone does not reproduce to the bit, and what remains."""
    moved: dict[int, int] = {}
    for name in _differing(a, b):
        theirs = b.weights[name].astype(np.float64)
        fault, says, ours = min(_forms(a, name, variants, theirs), key=lambda form: distance(form[2], theirs))
        form = _rounding(ours, theirs, b.weights[name].dtype)
        if not distance(ours, theirs) <= NEAR or form is None:  # `not <=`: NaN counts as far
            unknown[name] = distance(a.weights[name].astype(np.float64), theirs)
            continue
        if fault == "layer-order":
            layer, source = map(int, says.split())
            moved[layer], says = source, "layers"
        if form:
            inexact[name] = "up to the rounding"
        elif not np.array_equal(ours.astype(b.weights[name].dtype), b.weights[name]):
            inexact[name] = "up to the last bits"
        if not says and not form:
            last_bits[name] = distance(ours, theirs)
        for key in ((fault, says), ("rounding", form)):
            if key[1]:
                explained.setdefault(key, []).append(name)
    findings = []
    changed = {name for (fault, _), names in explained.items() if fault != "rounding" for name in names}
    for (fault, says), names in explained.items():
        words = _order(moved, a.config.n_layers) if fault == "layer-order" else says
        also = ", changed as above," if fault == "rounding" and changed & {*names} else ""
        reproduces = f"A{also} reproduces B"
        if says.startswith("A's"):
            reproduces = f"B reproduces A{also}"
        how = max(
            (inexact[name] for name in names if name in inexact), default="exactly"
        )  # the rounding, if there is one
        how = "exactly" if fault == "rounding" else how
        evidence = f"applying this change to {reproduces} {how} ({names_of(names)})"
        findings.append(Finding(fault, "B", "weights", words, evidence))
    if last_bits:
        evidence = f"difference at most {max(last_bits.values()):.1e} of the norm ({names_of(list(last_bits))})"
        findings.append(Finding("rounding", "B", "weights", "weights differ in the last bits of float32", evidence))
    if unknown:
        worst = max(unknown, key=lambda name: unknown[name])
        evidence = f"{names_of(list(unknown))}; difference at most {unknown[worst]:.1e} of the norm, in {worst}"
        if a.weights[worst].shape == b.weights[worst].shape:
            rows = np.flatnonzero((a.weights[worst] != b.weights[worst]).reshape(len(a.weights[worst]), -1).any(axis=1))
            evidence += f" (only in rows {rows.tolist()})" if len(rows) <= 8 else ""
        says = "weights differ, and no known fault explains the difference"
        if 2 * len(unknown) > len(a.weights):
            says += "; the weights may come from different models or training steps"
        findings.append(Finding("unknown", "B", "weights", says, evidence))
    return findings


def _differing(a: Subject, b: Subject) -> Iterator[str]:
    """The names of the weights that differ, with progress."""
    with progress("trying known faults: weights", count_params(a.config), "value") as work:
        for name in param_table(a.config):
            if name in b.weights and not np.array_equal(a.weights[name], b.weights[name], equal_nan=True):
                yield name
            work.advance(a.weights[name].size)


def explain_head(a: Subject, b: Subject) -> list[Finding]:
    """One model is tied, and the other has an output head that differs from its embedding."""
    if a.config.tie_embeddings == b.config.tie_embeddings:
        return []
    untied = b if a.config.tie_embeddings else a
    apart = distance(untied.weights[EMBEDDING].astype(np.float64), untied.weights[HEAD].astype(np.float64))
    if not apart:
        return []
    says = "the output head is a separate matrix" if untied is b else "the output head is the embedding"
    evidence = f"only {'B' if untied is b else 'A'} has {HEAD}, which differs from the embedding by {apart:.1e}"
    return [Finding("tied-head", "B", "configuration", says, f"{evidence} of its norm")]


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
