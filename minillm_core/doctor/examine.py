"""Finds where two models differ: runs both over the same tokens, and compares stages, losses, gradients and weights."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from minillm_core.config import ModelConfig, to_dict
from minillm_core.doctor.diagnosis import check_code, diagnose
from minillm_core.doctor.findings import Finding
from minillm_core.doctor.subjects import Subject
from minillm_core.doctor.weights import EMBEDDING, HEAD
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
from minillm_core.progress import progress, steps
from minillm_core.tensors import Tensors

logger = logging.getLogger(__name__)

TOP_K = (1, 2, 3, 5, 10, 20)


@dataclass(frozen=True)
class Difference:
    """How much an array of B differs from the same array of A."""

    name: str
    max_error: float
    relative: float
    """The largest error over the largest value of A, or the absolute error if that value is below 1."""
    norm: float
    """Norm of the difference over the norm of A."""
    cosine: float
    agrees: bool = False


@dataclass(frozen=True)
class Divergence:
    """The first stage that differs, and its error as in `Difference.relative`."""

    index: int
    stage: str
    error: float

    def __str__(self) -> str:
        return f"{self.stage} ({self.error:.1e})"


@dataclass(frozen=True)
class Report:
    """The result of comparing B with A."""

    a: str
    b: str
    dtype: str
    tokens: tuple[int, int]
    """Rows and columns."""
    rows_of_text: int
    """The number of rows that are text; the others are random."""
    equal: bool
    first_divergence: Divergence | None
    findings: list[Finding]
    stages: list[Difference]
    losses: Difference
    """The loss of every token, in nats."""
    mean_loss: tuple[float, float]
    mean_kl: float
    """In nats."""
    top_k: dict[int, float]
    """k -> share of positions at which both models have the same k most likely tokens."""
    gradients: list[Difference]
    weights: list[Difference]
    """The weights that differ at all."""
    configuration: dict[str, tuple[object, object]]
    """The fields that differ: name -> values in A and B."""
    logits: tuple[np.ndarray, np.ndarray] = field(repr=False)
    """A sample of the logits of A and B, for the plot."""
    tokenizers: str = "not compared"
    """Whether the tokenizers agree, in words. It does not influence `equal`."""


@np.errstate(invalid="ignore")  # a faulty model may give NaN, which agrees with nothing
def examine(a: Subject, b: Subject, tokens_BT: np.ndarray, dtype: str, *, rows_of_text: int) -> Report:
    """Runs both models and compares them. Looks for faults if they differ, and in float64 always checks their code.

    Args:
        tokens_BT: token ids, int32.
        dtype: precision of the computation: float64, float32 or bfloat16. It also decides the tolerances.

    Raises:
        InputError: the two models have different shapes, so they cannot be compared.
    """
    _check_same_shapes(a, b)
    ours, theirs = _run_both(a, b, tokens_BT, dtype)
    losses = _judged(_difference("losses", ours.losses_BT, theirs.losses_BT), dtype)
    alike_tied = a.config.tie_embeddings == b.config.tie_embeddings
    grads_a, grads_b = (x.gradients if alike_tied else _tied(x.gradients) for x in (ours, theirs))
    shared = [name for name in grads_a if name in grads_b]  # a Trace may have no gradients
    common = {name: a.weights[name] for name in param_table(a.config) if name in b.weights}
    compared = (ours.stages, grads_a, common)
    with progress("comparing", sum(x.size for arrays in compared for x in arrays.values()), "value") as work:

        def differences(ours: Tensors, theirs: Tensors, names: Iterable[str]) -> Iterator[Difference]:
            for name in names:
                yield _difference(name, ours[name], theirs[name])
                work.advance(ours[name].size)

        stages = [_judged(d, dtype) for d in differences(ours.stages, theirs.stages, stage_names(a.config))]
        gradients = [_judged_gradient(d, dtype) for d in differences(grads_a, grads_b, shared)]
        weights = [_judged_weight(d, dtype) for d in differences(common, b.weights, common)]
    mean_kl, top_k = compare_distributions(ours.stages["logits"], theirs.stages["logits"])
    equal = losses.agrees and all(difference.agrees for difference in (*gradients, *weights))
    if dtype == "bfloat16":
        equal = equal and mean_kl <= BFLOAT16_MEAN_KL and top_k[1] >= BFLOAT16_TOP1_AGREEMENT
    else:
        equal = equal and all(stage.agrees for stage in stages)
    first = next((Divergence(i, d.name, d.relative) for i, d in enumerate(stages) if not d.agrees), None)
    findings = []
    if dtype == "float64" or not equal:
        logger.info("comparing each model with the reference built from its own files, in float64")
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
    """bfloat16 is judged by the norm, because single values have large rounding errors. NaN agrees with nothing."""
    agrees = d.norm <= BFLOAT16_STAGE if dtype == "bfloat16" else d.relative <= TOLERANCES[dtype].logits
    return replace(d, agrees=agrees)


def _judged_gradient(d: Difference, dtype: str) -> Difference:
    if dtype == "bfloat16":
        return replace(d, agrees=d.cosine >= BFLOAT16_GRADIENT_COSINE and d.norm <= BFLOAT16_STAGE)
    return replace(d, agrees=d.norm <= TOLERANCES[dtype].gradient)


def _judged_weight(d: Difference, dtype: str) -> Difference:
    """Weights are compared too, because embedding rows of tokens that do not occur affect nothing else."""
    bound = BFLOAT16_MODULE if dtype == "bfloat16" else TOLERANCES[dtype].logits
    return replace(d, agrees=d.relative <= bound)


def _tied(gradients: Tensors) -> Tensors:
    """The gradients as if the head and the embedding were tied: one gradient, the sum of both."""
    if HEAD not in gradients:
        return gradients
    tied = {name: gradient for name, gradient in gradients.items() if name != HEAD}
    return tied | {EMBEDDING: gradients[EMBEDDING] + gradients[HEAD]}


def compare_distributions(ours_BTV: np.ndarray, theirs_BTV: np.ndarray) -> tuple[float, dict[int, float]]:
    """Mean KL divergence of B's next-token distributions from A's, in nats, and for each k the share of positions at
    which both models have the same k most likely tokens."""
    kl, sizes = [], [k for k in TOP_K if k <= ours_BTV.shape[-1]]
    same = dict.fromkeys(sizes, 0)
    for ours_TV, theirs_TV in steps([*zip(ours_BTV, theirs_BTV, strict=True)], "comparing the predictions", "row"):
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
            "the two models have different shapes",
            expected=", ".join(f"{key} {x}" for key, (x, _) in fields.items()),
            found=", ".join(f"{key} {y}" for key, (_, y) in fields.items()),
            where=f"{a.label} and {b.label}",
            hint="compare two checkpoints of the same model",
        )
