"""The loss of a model on a split of the data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SplitLoss:
    """Mean losses in nats per token."""

    mean: float
    """Over the whole split."""
    parts: dict[str, float]
    """Over each folder of a mixture, by its name; empty for one folder."""

    @classmethod
    def of(cls, sums: Mapping[str, tuple[float, float]]) -> "SplitLoss":
        """
        Args:
            sums: name of a folder -> sum of its weighted losses, sum of its weights.
        """
        losses, weights = zip(*sums.values(), strict=True)
        parts = {name: loss / weight for name, (loss, weight) in sums.items() if weight} if len(sums) > 1 else {}
        return cls(math.fsum(losses) / math.fsum(weights), parts)
