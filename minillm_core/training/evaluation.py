"""The held-out loss of a model during training."""

import math
from collections.abc import Callable

import numpy as np

from minillm_core.config import TrainConfig
from minillm_core.data.batches import PreparedData
from minillm_core.training.backend import EvalStep


def evaluate(
    eval_step: EvalStep,
    data: PreparedData,
    split: str,
    config: TrainConfig,
    n_batches: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss in nats per token over a whole split, or over `n_batches` micro-batches spread evenly over it.

    Args:
        check: called before each micro-batch; it stops the evaluation by raising an exception.
    """
    sums, n_targets = [], 0
    for batch in data.eval_batches(split, config.batch_size // config.grad_accum, config.seq_len, n_batches):
        check()
        losses_BS = np.asarray(eval_step(batch.tokens), np.float64)
        sums.append(float(losses_BS[batch.mask].sum()))
        n_targets += int(batch.mask.sum())
    return math.fsum(sums) / n_targets
