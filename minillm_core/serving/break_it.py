"""Break it: plants a known fault into one of the two frameworks, and runs the doctor on the right and the broken model.

A fault of weights or configuration is planted into the framework itself. A fault of code is not: the code of a running
server must not change. There the numpy reference, with this fault, stands in for the framework.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.doctor.compare import documents
from minillm_core.doctor.examine import Report, examine
from minillm_core.doctor.faults import FAULTS
from minillm_core.doctor.report import COLUMNS, finite, table, text_report, verdict
from minillm_core.doctor.subjects import Subject, open_subject
from minillm_core.errors import InputError
from minillm_core.model.params import count_params, param_table
from minillm_core.model.reference import Reference
from minillm_core.model.stages import Trace
from minillm_core.model.tolerance import TOLERANCES
from minillm_core.tensors import Tensors
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.training.backend import load_backend
from minillm_core.training.checkpoints import FRAMEWORKS

N_TOKENS = 64
"""Tokens that are compared if no text is given. Enough for all known faults, and little work."""
MOST_TOKENS = 256
"""A longer text is cut."""
SAMPLE_TOKENS, SAMPLE_CONTEXT = 16, 16
"""The sample continues the last tokens of the text. The reference computes it without a cache, so it is short."""
LARGEST_SAMPLED = 10_000_000
"""Parameters of the largest model that continues the text: in the reference, each token of a larger one takes long."""
LIKELY = 5
"""How many of the most likely next tokens are shown."""
NAMES = ("right", "broken")
"""What the two models are called in the result."""


@dataclass(frozen=True)
class Form:
    """One form of a fault: what is wrong, where it can be planted, and the model that has it."""

    says: str
    place: str
    """`weights`, `configuration` or `code`."""
    broken: Reference


class Breaker:
    """A checkpoint to break. It is opened at the first use. Calls from several threads wait for each other."""

    def __init__(self, checkpoint: str | Path):
        self._checkpoint = str(checkpoint)
        self._lock = threading.Lock()
        self._subject: Subject | None = None

    def faults(self) -> dict[str, list[Form]]:
        """The faults that this model can have, by name, each with its forms.

        Raises:
            InputError: there is no checkpoint, or it is damaged.
        """
        with self._lock:
            return _forms(self._open())

    def break_it(self, fault: str, side: str, text: str | None = None, form: int = 0) -> dict[str, Any]:
        """Plants a fault into one framework and compares it, in float64, with the right model in the other one.

        Args:
            fault: a name in `FAULTS`.
            side: the framework that gets the fault.
            text: the text on which both models run; None for the beginning of a document.
            form: which form of the fault, by its index in `faults`.

        Returns:
            What the page shows, as a JSON object: how the fault was planted, and who computed the broken model; the
            relative error of every stage (None if it is not finite), layer by layer; the verdict, the findings and the
            report of the doctor; the mean loss, the most likely next tokens and the continuation by both models.

        Raises:
            InputError: no such fault, form or side, a text that is too short, or a damaged checkpoint.
        """
        with self._lock:
            subject = self._open()
            planted = _choose(_forms(subject), fault, form)
            sides = installed()
            if side not in sides:
                raise InputError("unknown side", expected=" or ".join(sides), found=repr(side), hint="choose one")
            tokens_BT = _tokens(subject, text)
            right = next((other for other in sides if other != side), side)
            models = (_healthy(subject, right), _broken(subject, side, planted))
            predicted: dict[str, np.ndarray] = {}
            a, b = (_remembering(model, predicted, name) for model, name in zip(models, NAMES, strict=True))
            report = examine(a, b, tokens_BT, "float64", rows_of_text=1 if subject.tokenizer else 0)
            references = dict(zip(NAMES, (Reference(subject.config, subject.weights), planted.broken), strict=True))
            return finite(
                {"fault": fault, "form": form, "says": planted.says, "side": side, "place": planted.place}
                | {"computed_by": b.engine, "why": _why(planted, side), "right_side": right}
                | _results(report, fault)
                | _texts(subject.tokenizer, tokens_BT, predicted, references)
            )

    def _open(self) -> Subject:
        if self._subject is None:
            self._subject = open_subject(self._checkpoint, {})
        return self._subject


def installed() -> list[str]:
    """The frameworks that can be broken: those that are installed."""
    found = []
    for framework in FRAMEWORKS:
        try:
            load_backend(framework)
        except InputError:
            continue
        found.append(framework)
    return found


def _forms(subject: Subject) -> dict[str, list[Form]]:
    model = Reference(subject.config, subject.weights)
    window = min(N_TOKENS, subject.config.context_length) // 4
    hints = subject.config if subject.config.sliding_window else replace(subject.config, sliding_window=window)
    forms = {}
    for fault in FAULTS:
        variants = [Form(says, _place(model, broken), broken) for says, broken in fault.variants(model, hints)]
        if variants:
            forms[fault.name] = variants
    return forms


def _place(model: Reference, broken: Reference) -> str:
    if broken.weights is not model.weights:
        return "weights"
    return "configuration" if broken.config != model.config else "code"


def _choose(forms: dict[str, list[Form]], fault: str, form: int) -> Form:
    if fault not in forms:
        known = {known.name for known in FAULTS}
        problem = "this model cannot have this fault" if fault in known else "unknown fault"
        raise InputError(problem, expected=f"one of {', '.join(forms)}", found=repr(fault), hint="choose one of these")
    if not 0 <= form < len(forms[fault]):
        expected = f"0 to {len(forms[fault]) - 1}"
        raise InputError(f"unknown form of {fault}", expected=expected, found=form, hint="choose one of these")
    return forms[fault][form]


def _tokens(subject: Subject, text: str | None) -> np.ndarray:
    """Token ids (1, T), int32: those of the text, of a document, or random ones if there is no tokenizer."""
    limit = min(subject.config.context_length, MOST_TOKENS if text else N_TOKENS)
    if subject.tokenizer is None:
        if text:
            hint = "leave the text empty, to compare on random ids"
            raise InputError("a text needs a tokenizer, and this checkpoint has none", hint=hint)
        return np.random.default_rng(0).integers(0, subject.config.vocab_size, (1, limit)).astype(np.int32)
    ids = subject.tokenizer.encode(text or documents(1)[0], bos=True)[:limit]
    if len(ids) < 2:
        hint = "write a longer text, or leave it empty"
        raise InputError("the text is too short", expected="two tokens or more", found=f"{len(ids)}", hint=hint)
    return np.array([ids], np.int32)


def _healthy(subject: Subject, framework: str) -> Subject:
    return replace(subject, kind=framework, engine=framework, run=load_backend(framework).trace)


def _broken(subject: Subject, side: str, form: Form) -> Subject:
    """The model of one framework with a fault planted, or the reference as its stand-in."""
    broken = form.broken
    if form.place == "code":

        def run(config: ModelConfig, weights: Tensors, tokens_BT: np.ndarray, dtype: str) -> Trace:
            with np.errstate(all="ignore"):  # a faulty model may overflow or give NaN
                return broken.trace(tokens_BT)

        return replace(subject, kind=side, engine="reference", run=run)
    weights = {
        name: broken.weights[name].astype(subject.weights[name].dtype, copy=False)
        for name in param_table(broken.config)
    }
    return replace(_healthy(subject, side), config=broken.config, weights=weights)


def _remembering(subject: Subject, predicted: dict[str, np.ndarray], name: str) -> Subject:
    """The subject; its logits after the last token are put into `predicted`."""

    def run(config: ModelConfig, weights: Tensors, tokens_BT: np.ndarray, dtype: str) -> Trace:
        trace = subject.run(config, weights, tokens_BT, dtype)
        predicted[name] = trace.stages["logits"][0, -1]
        return trace

    return replace(subject, run=run)


def _why(form: Form, side: str) -> str:
    """Who computes the broken model, and why."""
    if form.place == "code":
        return (
            f"computed by the numpy reference in place of {side}, because this fault is in code, and the code of a "
            "running server is not changed"
        )
    return f"computed by {side} itself, because the fault is in its {form.place}"


def _results(report: Report, fault: str) -> dict[str, Any]:
    """The doctor's report as JSON."""
    first = report.first_divergence
    return {
        "stages": COLUMNS,
        "layers": [
            {"name": name, "cells": [{"stage": cell.name, "error": cell.relative} for cell in cells]}
            for name, cells in table(report)
        ],
        "bound": TOLERANCES[report.dtype].logits,
        "first_divergence": {"stage": first.stage, "error": first.error} if first else None,
        "equal": report.equal,
        "verdict": verdict(report),
        "named": any(fault in finding.fault.split(", ") for finding in report.findings),
        "findings": [
            {"fault": f.fault, "subject": f.subject, "place": f.place, "says": f.says, "evidence": f.evidence}
            for f in report.findings
        ],
        "report": text_report(report, color=False),
        "loss": {"right": report.mean_loss[0], "broken": report.mean_loss[1]},
    }


def _texts(
    tokenizer: Tokenizer | None,
    tokens_BT: np.ndarray,
    predicted: dict[str, np.ndarray],
    references: dict[str, Reference],
) -> dict[str, Any]:
    """The text, the most likely next tokens by both models, and how each goes on. None: no tokenizer, or no sample of a
    large model."""
    ids = [int(i) for i in tokens_BT[0]]
    if tokenizer is None:
        return {"n_tokens": len(ids), "text": None, "next": None, "sample": None}
    likely = {name: _likely(tokenizer, logits_V) for name, logits_V in predicted.items()}
    small = all(count_params(model.config) <= LARGEST_SAMPLED for model in references.values())
    samples = {name: _continue(tokenizer, model, ids) for name, model in references.items()} if small else None
    return {"n_tokens": len(ids), "text": tokenizer.decode(ids), "next": likely, "sample": samples}


def _likely(tokenizer: Tokenizer, logits_V: np.ndarray) -> list[dict[str, Any]]:
    log_probs_V = logits_V - np.logaddexp.reduce(logits_V)
    best = np.argsort(-log_probs_V, kind="stable")[:LIKELY]
    return [{"id": int(i), "text": tokenizer.decode_after([int(i)]), "logprob": float(log_probs_V[i])} for i in best]


def _continue(tokenizer: Tokenizer, model: Reference, ids: Sequence[int]) -> str:
    """The most likely continuation of the last tokens, token by token."""
    given = list(ids[-SAMPLE_CONTEXT:])[-model.config.context_length + SAMPLE_TOKENS :]
    new: list[int] = []
    with np.errstate(all="ignore"):
        while len(new) < SAMPLE_TOKENS:
            *_, (_, logits_BTV) = model.stages(np.array([given + new], np.int32))
            new.append(int(np.argmax(logits_BTV[0, -1])))
            if new[-1] in tokenizer.end_ids:
                break
    return tokenizer.decode_after(new)
