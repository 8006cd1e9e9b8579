"""The held-out loss of a model during training."""

import math
from collections.abc import Callable

import numpy as np

from minillm_core.config import TrainConfig
from minillm_core.data.split_loss import SplitLoss
from minillm_core.data.training_data import TrainingData
from minillm_core.progress import progress
from minillm_core.training.backend import EvalStep


def evaluate(
    eval_step: EvalStep,
    data: TrainingData,
    split: str,
    config: TrainConfig,
    n_batches: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> SplitLoss:
    """The loss over a whole split, or over `n_batches` micro-batches spread evenly over it.

    Args:
        check: called before each micro-batch; it stops the evaluation by raising an exception.
    """
    parts = data.eval_parts(split, config.batch_size // config.grad_accum, config.seq_len, n_batches)
    sums = {}
    n_all = data.n_eval_batches(split, config.batch_size // config.grad_accum, config.seq_len, n_batches)
    with progress("evaluating", n_all, "batch") as work:
        for name, batches in parts.items():
            losses, weights = [], []
            for batch in batches:
                check()
                losses_BT = np.asarray(eval_step(batch), np.float64)
                weights_BT = np.asarray(batch.weights_BT, np.float64)
                losses.append(float((losses_BT * weights_BT)[weights_BT > 0].sum()))  # padding may even have NaN
                weights.append(float(weights_BT.sum()))
                work.advance()
            sums[name] = math.fsum(losses), math.fsum(weights)
    return SplitLoss.of(sums, data.targets_of_parts(split))
