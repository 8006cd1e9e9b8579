"""The loss of a model on a split of the data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SplitLoss:
    """Mean losses in nats per token."""

    mean: float
    """Over the whole split. Each folder of a mixture counts by all its targets, also if a part of it was evaluated."""
    parts: dict[str, float]
    """Over each folder of a mixture, by its name; empty for one folder."""

    @classmethod
    def of(cls, sums: Mapping[str, tuple[float, float]], n_targets: Mapping[str, int]) -> "SplitLoss":
        """
        Args:
            sums: name of a folder -> sum of its weighted losses, sum of its weights.
            n_targets: name of a folder -> the number of all targets in the split.
        """
        means = {name: loss / weight for name, (loss, weight) in sums.items() if weight}
        if len(sums) == 1:
            return cls(next(iter(means.values())), {})
        total = sum(n_targets[name] for name in means)
        return cls(math.fsum(mean * n_targets[name] / total for name, mean in means.items()), means)
