"""Sampling noise: one uniform number per token, keyed by (seed, row, position), the same for both frameworks."""

from dataclasses import dataclass

import numpy as np

from minillm_core.errors import InputError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. Filters apply in this order: temperature, top_k, top_p."""

    temperature: float = 0.8
    """0 takes the most likely token; 1 leaves the distribution as it is."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the fewest most likely tokens that together have at least this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            expected = "0 (the most likely token) or at least 1e-6"
            raise InputError("temperature is out of range", expected=expected, found=self.temperature)
        if self.top_k < 0:
            raise InputError("top_k is negative", expected="0 (keep all) or more", found=self.top_k)
        if not 0 < self.top_p <= 1:
            raise InputError("top_p is out of range", expected="0 < top_p <= 1", found=self.top_p)
        if self.seed < 0:
            raise InputError("seed is negative", expected="0 or more", found=self.seed)


def uniforms(seed: int, n_rows: int, start: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for `count` positions from `start` (int, one per row): float32 (n_rows, count).

    They have 24 bits, so that float32 holds them exactly and never rounds one up to 1.
    """
    out = np.empty((n_rows, count), np.float32)
    for row in range(n_rows):
        first = int(start[row])
        bits = np.random.Philox(key=(row << 64) | (seed & (2**64 - 1))).advance(first // 4)
        words = bits.random_raw(first % 4 + count)[first % 4 :]
        out[row] = (words >> np.uint64(40)) * np.float32(2.0**-24)
    return out
