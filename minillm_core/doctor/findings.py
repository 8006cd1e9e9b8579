"""What the doctor finds, and how it measures and names it."""

from dataclasses import dataclass

import numpy as np

from minillm_core.model.tolerance import TOLERANCES

BOUND = 100 * TOLERANCES["float64"].logits
"""A stage is wrong if its largest error, relative to its largest value, is above this bound. Each stage is recomputed
from the model's own values of the previous stages, so rounding errors do not accumulate. A cast to float32 gives 1e-8
and more."""


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


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm of `ours`; infinite if the shapes differ."""
    if ours.shape != theirs.shape:
        return np.inf
    return float(np.linalg.norm(theirs - ours) / max(np.linalg.norm(ours), np.finfo(np.float64).tiny))


def names_of(names: list[str], noun: str = "tensor") -> str:
    """`1 tensor: X` or `8 tensors: X to Y`."""
    return f"1 {noun}: {names[0]}" if len(names) == 1 else f"{len(names)} {noun}s: {names[0]} to {names[-1]}"
