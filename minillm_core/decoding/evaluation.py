"""The loss of a model on a split of prepared data: scores every token."""

import math

import numpy as np

from minillm_core.data.batches import PreparedData
from minillm_core.decoding.generation import BaseGenerator

ROWS = 64
"""Windows scored per call."""


def score_split(generator: BaseGenerator, data: PreparedData, split: str, seq_len: int) -> float:
    """Mean loss in nats per token over every token of a split except the first.

    Args:
        seq_len: tokens per window; each window starts without context.
    """
    sums, n_scored = [], 0
    for batch in data.eval_batches(split, ROWS, seq_len):
        rows = [tokens[: n + 1] for tokens, n in zip(batch.tokens, batch.mask.sum(axis=1), strict=True) if n]
        scores = np.concatenate(generator.score(rows))
        sums.append(float(scores.sum(dtype=np.float64)))
        n_scored += len(scores)
    return -math.fsum(sums) / n_scored
