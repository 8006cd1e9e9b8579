"""Several folders of prepared data as one: each row of a batch comes from one of them, drawn with given weights.

Which row comes from which folder is a pure function of (seed, row), and each folder gives its own windows in the order
in which it would give them alone. So a run resumes anywhere, and no window is skipped or seen twice in an epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise

import numpy as np

from minillm_core.data.batches import Batch, Rows
from minillm_core.data.order import permute
from minillm_core.data.prepared import SPLITS, PreparedData
from minillm_core.data.training_data import TrainingData
from minillm_core.errors import InputError

PERIOD = 10_000
"""Rows after which each folder has given exactly its share; a weight is rounded to a multiple of 1 / PERIOD."""


@dataclass(frozen=True)
class Phase:
    """The weights from one step on."""

    from_step: int
    shares: tuple[int, ...]
    """Rows of each folder in PERIOD rows."""


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each folder in PERIOD rows: the weights in proportion, rounded so that their sum is PERIOD.

    Raises:
        InputError: a weight is so small that its folder would have no row.
    """
    exact = np.array(weights) / sum(weights) * PERIOD
    shares = np.floor(exact).astype(int)
    remaining = PERIOD - shares.sum()
    shares[np.argsort(shares - exact, kind="stable")[:remaining]] += 1
    if any(share == 0 < weight for share, weight in zip(shares, weights, strict=True)):
        expected = f"at least {1 / PERIOD:g} of the sum"
        raise InputError("a weight of data.mixture is too small", expected=expected, found=min(weights))
    return tuple(shares.tolist())


class Mixture(TrainingData):
    """Prepared data of several folders, with the interface of one."""

    def __init__(self, parts: Mapping[str, PreparedData], phases: Sequence[Phase]):
        """
        Args:
            parts: name -> the data of one folder.
            phases: by from_step, ascending; the first begins at 0.

        Raises:
            InputError: the parts have different tokenizers.
        """
        self.parts, self.phases = dict(parts), tuple(phases)
        self.dir = next(iter(parts.values())).dir  # of the tokenizer
        found = {name: data.hashes()["tokenizer"] for name, data in parts.items()}
        if len({*found.values()}) > 1:
            hint = "prepare them with the same tokenizer"
            listed = ", ".join(f"{name}: {digest[:8]}" for name, digest in found.items())
            raise InputError("the parts of the mixture have different tokenizers", found=listed, hint=hint)
        self.vocab_size, self.document_mask = next((data.vocab_size, data.document_mask) for data in parts.values())
        self.is_chat = any(data.is_chat for data in parts.values())

    def hashes(self) -> dict[str, str]:
        first = next(iter(self.parts.values())).hashes()
        return {"tokenizer": first["tokenizer"]} | {
            f"{split} of {name}": data.hashes()[split] for name, data in self.parts.items() for split in SPLITS
        }

    def verify(self) -> None:
        for data in self.parts.values():
            data.verify()

    def n_tokens(self, split: str) -> int:
        return sum(data.n_tokens(split) for data in self.parts.values())

    def targets_of_parts(self, split: str) -> dict[str, int]:
        return {name: data.n_targets(split) for name, data in self.parts.items()}

    def tokens_per_byte(self, split: str) -> float | None:
        sizes = [data.splits[split].n_bytes for data in self.parts.values()]
        n_bytes = sum(size for size in sizes if size is not None)
        is_known = not self.is_chat and None not in sizes
        return sum(data.n_targets(split) for data in self.parts.values()) / n_bytes if is_known else None

    def train_rows(self, numbers: np.ndarray, batch_size: int, seq_len: int, seed: int) -> Rows:
        """The rows of a folder are those that it would give alone, in their order."""
        part, index = self.rows_of(numbers, batch_size, seed)
        shape = len(part), seq_len + 1
        begins = np.empty(shape, bool) if self.document_mask else None
        found = Rows(np.empty(shape, np.int32), np.empty(shape, bool), begins)
        for number, data in enumerate(self.parts.values()):
            here = part == number
            own = data.train_rows(index[here], batch_size, seq_len, seed)
            found.tokens[here], found.counts[here] = own.tokens, own.counts
            if begins is not None:
                begins[here] = own.begins
        return found

    def rows_of(self, rows: np.ndarray, batch_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """For rows, numbered over all batches: the number of the folder, and how many rows it gave before."""
        part, index = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        stops = [phase.from_step * batch_size for phase in self.phases[1:]]
        all_before = _counts_before_phases(self.phases, batch_size, seed)
        for phase, stop, before in zip(self.phases, [*stops, None], all_before, strict=True):
            start = phase.from_step * batch_size
            here = (rows >= start) & (rows < stop if stop is not None else True)
            key = (seed, phase.from_step)
            part[here], index[here] = _parts_and_counts(rows[here] - start, phase.shares, key, before)
        return part, index

    def eval_batches(self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None) -> Iterator[Batch]:
        """The batches of each folder in turn."""
        return chain.from_iterable(self.eval_parts(split, batch_size, seq_len, n_batches).values())

    def eval_parts(
        self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None
    ) -> dict[str, Iterator[Batch]]:
        counts = self._counts(split, n_batches)
        return {n: data.eval_batches(split, batch_size, seq_len, counts[n]) for n, data in self.parts.items()}

    def n_eval_batches(self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None) -> int:
        counts = self._counts(split, n_batches)
        return sum(data.n_eval_batches(split, batch_size, seq_len, counts[n]) for n, data in self.parts.items())

    def _counts(self, split: str, n_batches: int | None) -> dict[str, int | None]:
        """All batches of each folder, or n_batches in proportion to the sizes of the splits."""
        if n_batches is None:
            return dict.fromkeys(self.parts)
        sizes = {name: data.n_tokens(split) for name, data in self.parts.items()}
        return {name: max(1, round(size / sum(sizes.values()) * n_batches)) for name, size in sizes.items()}


@lru_cache(maxsize=4)
def _block(number: int, shares: tuple[int, ...], key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For each of PERIOD rows: its folder, and how many rows of that folder are before it in the block."""
    order = permute(np.arange(PERIOD), PERIOD, (*key, number))
    part = np.searchsorted(np.cumsum(shares), order, side="right")
    count = np.empty(PERIOD, np.int64)
    for i, share in enumerate(shares):
        count[part == i] = np.arange(share)
    return part, count


def _parts_and_counts(
    rows: np.ndarray, shares: tuple[int, ...], key: tuple[int, int], before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    part, index = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for number in np.unique(rows // PERIOD).tolist():
        here = rows // PERIOD == number
        block, count = _block(number, shares, key)
        part[here], index[here] = block[rows[here] % PERIOD], count[rows[here] % PERIOD]
        index[here] += number * np.array(shares)[part[here]] + before[part[here]]
    return part, index


@lru_cache(maxsize=4)
def _counts_before_phases(phases: tuple[Phase, ...], batch_size: int, seed: int) -> tuple[np.ndarray, ...]:
    """How many rows each folder gives before each phase."""
    counts = [np.zeros(len(phases[0].shares), np.int64)]
    for phase, following in pairwise(phases):
        n_rows = (following.from_step - phase.from_step) * batch_size
        counts.append(counts[-1] + _counts_before(n_rows, phase.shares, (seed, phase.from_step)))
    return tuple(counts)


def _counts_before(row: int, shares: tuple[int, ...], key: tuple[int, int]) -> np.ndarray:
    """How many rows each folder gives before a row."""
    block, _ = _block(row // PERIOD, shares, key)
    in_block = np.bincount(block[: row % PERIOD], minlength=len(shares))
    return row // PERIOD * np.array(shares) + in_block
