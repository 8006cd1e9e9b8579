"""Sampling options, and the random numbers for sampling, which are the same in both frameworks."""

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minillm_core.errors import InputError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. The options are applied in this order, as in `transformers`: repetition_penalty,
    temperature, top_k, top_p, min_p. Tokens of equal probability are kept or dropped together."""

    temperature: float = 0.8
    """0 takes the most likely token; 1 leaves the distribution as it is."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the smallest set of most likely tokens whose total probability is at least this."""
    min_p: float = 0.0
    """Keep the tokens whose probability is at least this fraction of the highest one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """For tokens that are already in the prompt or the continuation, divide positive logits by this, and multiply
    negative logits by it (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a value out of range."""
        for name in ("top_k", "seed"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        checks = {
            "temperature": ("0 (the most likely token), or 1e-6 to 1e6", lambda x: x == 0 or 1e-6 <= x <= 1e6),
            "top_k": ("0 (keep all) or more", lambda x: x >= 0),
            "top_p": ("0 < top_p <= 1", lambda x: 0 < x <= 1),
            "min_p": ("0 <= min_p <= 1", lambda x: 0 <= x <= 1),
            "repetition_penalty": ("1e-3 to 1e3", lambda x: 1e-3 <= x <= 1e3),
            "seed": ("0 to 2^64 - 1", lambda x: 0 <= x < 1 << 64),
        }
        for name, (expected, holds) in checks.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) or not holds(value):
                raise InputError(f"{name} is out of range", expected=expected, found=value)


class Filters(NamedTuple):
    """The sampling options of every row, as arrays (B, 1) in the form in which they are applied to logits. An option
    that is off has a value that changes nothing, so the rows of a batch can have different options."""

    repetition_penalty_B1: Any
    temperature_B1: Any
    """1 for a row that takes the most likely token."""
    top_k_B1: Any
    top_p_B1: Any
    log_min_p_B1: Any
    greedy_B: Any
    """Whether a row takes the most likely token (temperature 0); then only its repetition penalty applies."""

    @classmethod
    def of(cls, rows: Sequence[SamplingConfig], vocab_size: int) -> "Filters":
        """Arrays of numpy; all float64, but top_k is int32 and greedy_B is bool."""
        greedy_B = np.array([row.temperature == 0 for row in rows])

        def column(name: str, off: float) -> np.ndarray:
            values_B = np.array([getattr(row, name) for row in rows], np.float64)
            return np.where(greedy_B, off, values_B)[:, None]

        top_k_B1, top_p_B1 = column("top_k", 0), column("top_p", 1)
        with np.errstate(divide="ignore"):
            log_min_p_B1 = np.log(column("min_p", 0))
        return cls(
            np.array([[row.repetition_penalty] for row in rows], np.float64),
            column("temperature", 1),
            np.where(top_k_B1 == 0, vocab_size, np.minimum(top_k_B1, vocab_size)).astype(np.int32),
            np.where(top_p_B1 < 1, top_p_B1, np.inf),  # rounded probabilities can add up to 1 before the last token
            log_min_p_B1,
            greedy_B,
        )


def whole_number(name: str, value: object) -> int:
    """The value as an int; raises InputError if it is not one."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name} is not a whole number", expected="an int", found=repr(value)) from None


def row_key(prompt: Sequence[int], sample: int) -> int:
    """The key of a continuation's random numbers: a 64-bit hash of its prompt and its sample number.

    So a continuation does not depend on the other prompts of a batch or on its position in it, and different prompts
    draw independent numbers.
    """
    digest = hashlib.blake2b(np.asarray([sample, *prompt], "<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(seed: int, key: int, start: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for `count` positions from `start`: float32 (count,).

    They have 24 bits, so float32 holds them exactly and none is rounded up to 1.
    """
    bits = np.random.Philox(key=(key << 64) | seed).advance(start // 4)
    words = bits.random_raw(start % 4 + count)[start % 4 :]
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
