"""Where two models differ: both run over the same tokens, and their stages, losses and gradients are compared."""

import logging
from dataclasses import dataclass, field, replace

import numpy as np

from minillm_core.config import ModelConfig, to_dict
from minillm_core.doctor.diagnosis import EMBEDDING, HEAD, Finding, check_code, diagnose
from minillm_core.doctor.subjects import Subject
from minillm_core.errors import InputError
from minillm_core.model.params import param_table
from minillm_core.model.stages import Trace, stage_names
from minillm_core.model.tolerance import (
    BFLOAT16_GRADIENT_COSINE,
    BFLOAT16_MEAN_KL,
    BFLOAT16_MODULE,
    BFLOAT16_STAGE,
    BFLOAT16_TOP1_AGREEMENT,
    TOLERANCES,
)
from minillm_core.tensors import Tensors

logger = logging.getLogger(__name__)

TOP_K = (1, 2, 3, 5, 10, 20)


@dataclass(frozen=True)
class Difference:
    """How far B's array is from A's."""

    name: str
    max_error: float
    relative: float
    """The largest error over the largest value, or absolute where that is below 1."""
    norm: float
    """Norm of the difference over the norm."""
    cosine: float
    agrees: bool = False


@dataclass(frozen=True)
class Divergence:
    """The first stage at which two models differ, and by how much relative to its largest value."""

    index: int
    stage: str
    error: float

    def __str__(self) -> str:
        return f"{self.stage} ({self.error:.1e})"


@dataclass(frozen=True)
class Report:
    """What was found of B against A."""

    a: str
    b: str
    dtype: str
    tokens: tuple[int, int]
    """Rows and columns."""
    rows_of_text: int
    """How many of the rows are text; the others are random."""
    equal: bool
    first_divergence: Divergence | None
    findings: list[Finding]
    stages: list[Difference]
    losses: Difference
    """Of every token, in nats."""
    mean_loss: tuple[float, float]
    mean_kl: float
    """Nat."""
    top_k: dict[int, float]
    """Share of positions at which both have the same k most likely tokens."""
    gradients: list[Difference]
    weights: list[Difference]
    """Those that differ at all."""
    configuration: dict[str, tuple[object, object]]
    """The fields that differ."""
    logits: tuple[np.ndarray, np.ndarray] = field(repr=False)
    """A sample of both, for the plot."""
    tokenizers: str = "not compared"
    """Whether text becomes the same ids, in words; models are equal or not without it."""


@np.errstate(invalid="ignore")  # a wrong model may give anything; NaN agrees with nothing
def examine(a: Subject, b: Subject, tokens_BT: np.ndarray, dtype: str, *, rows_of_text: int) -> Report:
    """Runs both models, compares them, and looks for the faults if they differ.

    Args:
        tokens_BT: token ids, int32.
        dtype: of the computation: float64, float32 or bfloat16; it decides the tolerances too.

    Raises:
        InputError: the two have other shapes, so that there is nothing to compare.
    """
    _check_same_shapes(a, b)
    ours, theirs = _run_both(a, b, tokens_BT, dtype)
    stages = [_judged(_difference(n, ours.stages[n], theirs.stages[n]), dtype) for n in stage_names(a.config)]
    losses = _judged(_difference("losses", ours.losses_BT, theirs.losses_BT), dtype)
    alike_tied = a.config.tie_embeddings == b.config.tie_embeddings
    grads_a, grads_b = (x.gradients if alike_tied else _tied(x.gradients) for x in (ours, theirs))
    gradients = [_judged_gradient(_difference(n, grads_a[n], grads_b[n]), dtype) for n in grads_a]
    common = [name for name in param_table(a.config) if name in b.weights]
    weights = [_judged_weight(_difference(name, a.weights[name], b.weights[name]), dtype) for name in common]
    mean_kl, top_k = compare_distributions(ours.stages["logits"], theirs.stages["logits"])
    equal = losses.agrees and all(difference.agrees for difference in (*gradients, *weights))
    if dtype == "bfloat16":
        equal = equal and mean_kl <= BFLOAT16_MEAN_KL and top_k[1] >= BFLOAT16_TOP1_AGREEMENT
    else:
        equal = equal and all(stage.agrees for stage in stages)
    first = next((Divergence(i, d.name, d.relative) for i, d in enumerate(stages) if not d.agrees), None)
    findings = []
    if dtype == "float64" or not equal:
        logger.info("holding both against the reference of their files, in float64")
        exact = (ours, theirs) if dtype == "float64" else _run_both(a, b, tokens_BT, "float64")
        for name, subject, trace in (("A", a, exact[0]), ("B", b, exact[1])):
            findings += check_code(name, subject, trace, tokens_BT)
        if not equal:
            findings = diagnose(a, b, *exact, tokens_BT, findings)
    sample = np.random.default_rng(0).integers(ours.stages["logits"].size, size=4000)
    return Report(
        a=a.label,
        b=b.label,
        dtype=dtype,
        tokens=(tokens_BT.shape[0], tokens_BT.shape[1]),
        rows_of_text=rows_of_text,
        equal=equal,
        first_divergence=first,
        findings=findings,
        stages=stages,
        losses=losses,
        mean_loss=(float(ours.losses_BT.mean()), float(theirs.losses_BT.mean())),
        mean_kl=mean_kl,
        top_k=top_k,
        gradients=gradients,
        weights=[weight for weight in weights if not weight.max_error == 0],  # noqa: SIM201 (NaN)
        configuration=_config_differences(a.config, b.config),
        logits=(ours.stages["logits"].flat[sample], theirs.stages["logits"].flat[sample]),
    )


def _run_both(a: Subject, b: Subject, tokens_BT: np.ndarray, dtype: str) -> tuple[Trace, Trace]:
    logger.info(f"running A in {a.engine} and B in {b.engine}, {dtype}")
    ours, theirs = (subject.run(subject.config, subject.weights, tokens_BT, dtype) for subject in (a, b))
    return ours, theirs


def _difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    error, largest = np.abs(theirs - ours).max(), np.abs(ours).max()
    norms = np.linalg.norm(ours), np.linalg.norm(theirs)
    norm = np.linalg.norm(theirs - ours) / norms[0] if norms[0] else float(norms[1] > 0)
    cosine = np.vdot(ours, theirs) / (norms[0] * norms[1]) if all(norms) else float(norms[0] == norms[1])
    return Difference(name, float(error), float(error / max(1.0, largest)), float(norm), float(cosine))


def _judged(d: Difference, dtype: str) -> Difference:
    """In bfloat16, where single numbers round far, values agree by the norm. NaN agrees with nothing."""
    agrees = d.norm <= BFLOAT16_STAGE if dtype == "bfloat16" else d.relative <= TOLERANCES[dtype].logits
    return replace(d, agrees=agrees)


def _judged_gradient(d: Difference, dtype: str) -> Difference:
    if dtype == "bfloat16":
        return replace(d, agrees=d.cosine >= BFLOAT16_GRADIENT_COSINE and d.norm <= BFLOAT16_STAGE)
    return replace(d, agrees=d.norm <= TOLERANCES[dtype].gradient)


def _judged_weight(d: Difference, dtype: str) -> Difference:
    """Tokens that do not occur leave rows of the embedding unseen by everything else."""
    bound = BFLOAT16_MODULE if dtype == "bfloat16" else TOLERANCES[dtype].logits
    return replace(d, agrees=d.relative <= bound)


def _tied(gradients: Tensors) -> Tensors:
    """The gradients as if the head were the embedding."""
    if HEAD not in gradients:
        return gradients
    tied = {name: gradient for name, gradient in gradients.items() if name != HEAD}
    return tied | {EMBEDDING: gradients[EMBEDDING] + gradients[HEAD]}


def compare_distributions(ours_BTV: np.ndarray, theirs_BTV: np.ndarray) -> tuple[float, dict[int, float]]:
    """Mean Kullback-Leibler divergence of B's next-token distributions from A's, in nat, and for each k the share of
    positions at which both have the same k most likely tokens."""
    kl, sizes = [], [k for k in TOP_K if k <= ours_BTV.shape[-1]]
    same = dict.fromkeys(sizes, 0)
    for ours_TV, theirs_TV in zip(ours_BTV, theirs_BTV, strict=True):
        log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (ours_TV, theirs_TV))
        kl.append(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))
        order_p, order_q = (np.argsort(-x, axis=-1, kind="stable")[:, : sizes[-1]] for x in (ours_TV, theirs_TV))
        for k in sizes:
            same[k] += int(np.sum(np.all(np.sort(order_p[:, :k]) == np.sort(order_q[:, :k]), axis=-1)))
    n_positions = ours_BTV.shape[0] * ours_BTV.shape[1]
    return float(np.maximum(np.mean(kl), 0.0)), {k: count / n_positions for k, count in same.items()}


def _config_differences(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[object, object]]:
    ours, theirs = (to_dict(replace(config, head_dim=config.resolved_head_dim)) for config in (a, b))
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key] and key != "init_std"}


def _check_same_shapes(a: Subject, b: Subject) -> None:
    ours, theirs = (
        {name: spec.shape for name, spec in param_table(subject.config).items() if name != "lm_head.weight"}
        for subject in (a, b)
    )
    if ours != theirs:
        fields = _config_differences(a.config, b.config)
        raise InputError(
            "the two models have other shapes",
            expected=", ".join(f"{key} {x}" for key, (x, _) in fields.items()),
            found=", ".join(f"{key} {y}" for key, (_, y) in fields.items()),
            where=f"{a.label} and {b.label}",
            hint="compare checkpoints of one model",
        )
