"""Learning rate: linear warm-up, then cosine decay. Computed on the host and passed to the train step as a scalar."""

import math

from minillm_core.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of update number `step` (from 0) in a run of `steps` updates.

    During warm-up, the rate is (step + 1) / (warmup_steps + 1) of the full rate, so the first update is not zero. This
    is the schedule of the original Mini-LLM.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)
