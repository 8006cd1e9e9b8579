"""How far the two frameworks may differ, by precision: the one table that the tests and the benchmark hold them to.

Errors are relative to the largest value compared, or absolute where that is below 1.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds at one precision at which rounding alone separates the frameworks."""

    module: float
    logits: float
    gradient: float
    """Relative norm of the difference, per parameter."""
    run_loss: float
    """Over 100 steps."""


TOLERANCES = {
    "float64": Tolerance(module=1e-13, logits=1e-12, gradient=1e-11, run_loss=1e-11),
    "float32": Tolerance(module=1e-5, logits=5e-5, gradient=1e-4, run_loss=1e-4),
}

# bfloat16 is compared as the production path: modules by value, whole models by their distributions and directions.
BFLOAT16_MODULE = 1e-2
"""Relative norm of the difference; one rounding is 2^-9 = 2e-3 of a value."""
BFLOAT16_STAGE = 0.1
"""The same for whatever a model computes on its way (measured on random models of 2 layers: at most 0.03)."""
BFLOAT16_MEAN_KL = 1e-3
"""Nat, at T = 512."""
BFLOAT16_TOP1_AGREEMENT = 0.97
BFLOAT16_GRADIENT_COSINE = 0.999
