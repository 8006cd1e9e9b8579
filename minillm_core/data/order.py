"""Pseudo-random orders that are never stored."""

import hashlib

import numpy as np


def permute(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Applies a pseudo-random permutation of range(n), drawn from `key`, to int64 indices.

    The permutation is never stored: each index is encrypted by a six-round Feistel network over the next power of
    four, again and again until the result is below n (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains").
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    seed = hashlib.sha256(repr(key).encode()).digest()
    round_keys = np.random.Philox(key=int.from_bytes(seed[:16], "little")).random_raw(6)

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & low
        for round_key in round_keys:
            mixed = right + round_key  # splitmix64's finaliser; uint64 wraps by design
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & low)
        return (left << shift) | right

    values = encrypt(index.astype(np.uint64))
    while (outside := values >= n).any():
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)
