"""How much the two frameworks may differ, by precision. The tests, the benchmark and the doctor use these bounds.

Errors are relative to the largest value compared, or absolute if that value is below 1.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds at a precision at which the frameworks differ only by rounding."""

    module: float
    logits: float
    gradient: float
    """Relative norm of the difference, for each parameter."""
    run_loss: float
    """The loss over 100 training steps."""


TOLERANCES = {
    "float64": Tolerance(module=1e-13, logits=1e-12, gradient=1e-11, run_loss=1e-11),
    "float32": Tolerance(module=1e-5, logits=5e-5, gradient=1e-4, run_loss=1e-4),
}

# bfloat16 is compared as it is used in production: modules by their values, whole models by the distributions of the
# next token and the directions of the gradients.
BFLOAT16_MODULE = 1e-2
"""Relative norm of the difference. One rounding changes a value by at most 2^-8 = 4e-3."""
BFLOAT16_STAGE = 0.1
"""Relative norm of the difference of a stage, the losses or a gradient (measured on random models of 2 layers: at most
0.03)."""
BFLOAT16_MEAN_KL = 1e-3
"""In nats, at T = 512."""
BFLOAT16_TOP1_AGREEMENT = 0.97
BFLOAT16_GRADIENT_COSINE = 0.999
