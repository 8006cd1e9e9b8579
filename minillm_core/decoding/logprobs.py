"""Log-probabilities of tokens, from their logits on the host.

Shapes: V vocabulary.
"""

import numpy as np

Alternatives = list[tuple[int, float]]
"""Tokens and their natural log-probabilities under the model, most likely first."""


def normalizer(logits_V: np.ndarray) -> float:
    """What is subtracted from a logit to get its natural log-probability."""
    highest = logits_V.max()
    return float(highest + np.log(np.exp(logits_V - highest).sum(dtype=np.float64)))


def most_likely(logits_V: np.ndarray, n: int) -> Alternatives:
    """The n most likely tokens with their log-probabilities; of equal ones, the first."""
    if n == 0:
        return []
    n = min(n, len(logits_V))
    least = np.partition(logits_V, -n)[-n] if n > 1 else logits_V.max()
    candidates = np.flatnonzero(logits_V >= least)
    best = candidates[np.argsort(-logits_V[candidates], kind="stable")[:n]]
    subtracted = normalizer(logits_V)
    return [(token, float(logits_V[token]) - subtracted) for token in best.tolist()]
