"""Prepared data: token files, and batches as a pure function of (seed, step).

There is no iterator state: a resumed run asks for the batch of its next step.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.files import hash_file, user_path
from minillm_core.tensors import Array
from minillm_core.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
FORMAT_VERSION = 1
ALL_ROWS = slice(None)
REPORT_EVERY = 30.0
"""Seconds between two reports of a long evaluation."""


def redo_hint(folder: Path) -> str:
    """The hint for a folder that cannot be used."""
    return f"remove {folder} or choose a different --data.dir, then prepare the data again"


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens, the token that each must predict, and how much each prediction counts: all (B, T).

    On the host the arrays are numpy's; each framework copies them to its device. All batches of a run should have the
    same optional fields: JAX compiles the step anew for every combination.
    """

    tokens_BT: Array
    """Token ids, int32."""
    targets_BT: Array
    """The token that follows each, int32."""
    weights_BT: Array
    """The factor of each target's loss, float32. The loss of a batch is the weighted mean. 0 leaves a target out of it,
    but its loss must be finite too."""
    positions_BT: Array | None = None
    """The position of each token in its document, int32. None: 0 to T - 1 in every row."""
    segments_BT: Array | None = None
    """The document of each token, int32. Tokens of one row that are in different segments do not see each other. None:
    every row is one document. Give weight 0 to a target that is the first token of the next document."""

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> "Batch":
        """From rows of T + 1 tokens: each but the first is predicted from those before it, all with weight 1."""
        return cls(rows[:, :-1], rows[:, 1:], np.ones((len(rows), rows.shape[1] - 1), np.float32))

    @classmethod
    def from_tokens(cls, tokens_BT: np.ndarray) -> "Batch":
        """From rows of T tokens: each token predicts the next one, the last one of a row nothing (its weight is 0)."""
        weights_BT = np.ones(tokens_BT.shape, np.float32)
        weights_BT[:, -1] = 0
        return cls(tokens_BT, np.roll(tokens_BT, -1, axis=1), weights_BT)

    def check(self, config: ModelConfig, n_micro: int = 1) -> None:
        """Checks a batch on the host, before it is used in n_micro parts.

        Raises:
            InputError: shapes or dtypes do not fit; ids outside the vocabulary; positions outside the context; weights
                that are negative, not finite in float32, or all zero.
        """
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {name: np.asarray(array) for name, array in given.items() if array is not None}
        shape = arrays["tokens_BT"].shape
        for name, array in arrays.items():
            dtype, words = (np.floating, "floats") if name == "weights_BT" else (np.integer, "integers")
            if array.shape != shape or array.ndim != 2 or not np.issubdtype(array.dtype, dtype):
                expected = f"{words} (B, T)" if len(shape) != 2 else f"{words} (B, T) = {shape}"
                found = f"{array.dtype} {array.shape}"
                raise InputError(f"{name} does not fit the batch", expected=expected, found=found)
        if shape[0] % n_micro:
            problem = "the rows of the batch cannot be divided into micro-batches"
            raise InputError(problem, expected=f"a multiple of train.grad_accum, {n_micro}", found=f"{shape[0]} rows")
        limits = {"tokens_BT": (0, config.vocab_size), "targets_BT": (0, config.vocab_size)}
        limits |= {"positions_BT": (0, config.context_length), "segments_BT": (-(1 << 31), 1 << 31)}
        for name, (least, limit) in limits.items():
            if name in arrays and arrays[name].size and not least <= arrays[name].min() <= arrays[name].max() < limit:
                found = f"{arrays[name].min()} to {arrays[name].max()}"
                hint = "to leave out a target, give it the weight 0 and any valid id" if "targets" in name else None
                raise InputError(f"{name} is out of range", expected=f"{least} to {limit - 1}", found=found, hint=hint)
        with np.errstate(over="ignore"):
            weights_BT = arrays["weights_BT"].astype(np.float32)
            total = weights_BT.sum()
        if not (np.isfinite(total) and total > 0 and weights_BT.min() >= 0):
            found = f"from {weights_BT.min(initial=np.inf)} to {weights_BT.max(initial=-np.inf)}, sum {total}"
            expected = "finite numbers of 0 or more, not all 0 (in float32)"
            raise InputError("weights_BT is out of range", expected=expected, found=found)


class PreparedData:
    """The memory-mapped tokens of one folder of prepared data."""

    def __init__(self, folder: str | Path, vocab_size: int):
        """Opens and checks a folder.

        Raises:
            InputError: a file is missing or truncated, or the vocabulary size differs.
        """
        self.dir = user_path(folder)
        redo = redo_hint(self.dir)
        meta_path = self.dir / "meta.json"
        if not meta_path.is_file():
            hint = "choose a different folder for the prepared data"
            if not self.dir.exists():
                hint = "check the path, or prepare the data first"
            raise InputError("not a folder of prepared data", expected="meta.json", where=self.dir, hint=hint)
        try:
            self.meta: dict[str, Any] = json.loads(meta_path.read_text(encoding="utf-8"))
            dtype = np.dtype(self.meta["dtype"])
            found = self.meta["vocab_size"]
            n_tokens = {split: int(self.meta[split]["n_tokens"]) for split in SPLITS}
            if self.meta["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {self.meta['format_version']}, not {FORMAT_VERSION}")
            if min(self.meta[split]["n_bytes"] for split in SPLITS) < 1:
                raise ValueError("n_bytes is not positive")
            self.hashes()
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("damaged data file", found=repr(error), where=meta_path, hint=redo) from error
        if found != vocab_size:
            problem = "the data's vocabulary size differs from the model's"
            raise InputError(problem, expected=vocab_size, found=found, where=self.dir, hint=redo)
        self.vocab_size = vocab_size
        self.tokens: dict[str, np.ndarray] = {}
        for split in SPLITS:
            path = self.dir / f"{split}.bin"
            expected = n_tokens[split] * dtype.itemsize
            size = path.stat().st_size if path.is_file() else "no file"
            if size != expected:
                problem = "missing or truncated data file"
                raise InputError(problem, expected=f"{expected} bytes", found=size, where=path, hint=redo)
            self.tokens[split] = np.memmap(path, dtype, mode="r")

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.dir / "tokenizer.model")

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the tokenizer and of both splits, which identify this data; recorded when it was prepared."""
        return {"tokenizer": self.meta["tokenizer_sha256"], **{split: self.meta[split]["sha256"] for split in SPLITS}}

    def verify(self) -> None:
        """Reads every file and compares it with its hash.

        Raises:
            InputError: a file was changed after it was prepared.
        """
        names = {"tokenizer": "tokenizer.model"} | {split: f"{split}.bin" for split in SPLITS}
        for key, digest in self.hashes().items():
            if not (self.dir / names[key]).is_file() or hash_file(self.dir / names[key]) != digest:
                problem = "a data file is missing or was changed after it was prepared"
                raise InputError(problem, where=self.dir / names[key], hint=redo_hint(self.dir))

    def tokens_per_byte(self, split: str) -> float:
        """Predicted tokens per byte of the split's text: the factor from nats per token to nats per byte."""
        return (len(self.tokens[split]) - 1) / self.meta[split]["n_bytes"]

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int, rows: slice = ALL_ROWS) -> Batch:
        """The training batch of one step, (batch_size, seq_len), all weights 1.

        The split is cut into windows of seq_len tokens; each epoch visits every window once, in an order drawn from
        (seed, epoch). Memory does not grow with the size of the data.

        Args:
            rows: the rows of the batch to return, for example those of one of several processes.
        """
        n_windows = self._count_windows("train", seq_len)
        position = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
        epoch, index = position // n_windows, position % n_windows
        for e in np.unique(epoch):
            index[epoch == e] = permute(index[epoch == e], n_windows, (seed, int(e)))
        return Batch.from_rows(self._read("train", index * seq_len, seq_len))

    def eval_batches(self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None) -> Iterator[Batch]:
        """The split in order, every token except the first predicted once; or `n_batches` spread evenly over it.

        Each window starts without context. The last batch is padded; the padding has weight 0. The share that is
        done and the time left are logged every REPORT_EVERY seconds.
        """
        tokens = self.tokens[split]
        n_targets = len(tokens) - 1
        starts = np.arange(0, n_targets, seq_len)
        if n_batches is not None and n_batches * batch_size < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, n_batches * batch_size).astype(int)]
        begin = reported = time.monotonic()
        for first in range(0, len(starts), batch_size):
            if first and (now := time.monotonic()) - reported >= REPORT_EVERY:
                left, reported = int((now - begin) / first * (len(starts) - first)), now
                logger.info(
                    f"evaluated {first / len(starts):.0%}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
                )
            rows = starts[first : first + batch_size]
            rows = np.concatenate([rows, np.full(batch_size - len(rows), n_targets)])
            is_target_BT = rows[:, None] + np.arange(seq_len) < n_targets
            batch = Batch.from_rows(self._read(split, rows, seq_len))
            yield replace(batch, weights_BT=is_target_BT.astype(np.float32))

    def _count_windows(self, split: str, seq_len: int) -> int:
        n_windows = (len(self.tokens[split]) - 1) // seq_len
        if n_windows < 1:
            found = f"{len(self.tokens[split])} tokens"
            raise InputError(
                f"the {split} split is shorter than one sequence",
                expected=f"{seq_len + 1} tokens",
                found=found,
                where=self.dir,
            )
        return n_windows

    def _read(self, split: str, starts: np.ndarray, seq_len: int) -> np.ndarray:
        """Windows of seq_len + 1 tokens, int32, from each start."""
        tokens = self.tokens[split]
        index = np.minimum(starts[:, None] + np.arange(seq_len + 1), len(tokens) - 1)
        windows = tokens[index].astype(np.int32)
        if windows.max() >= self.vocab_size:
            raise InputError(
                "token id outside the vocabulary",
                expected=f"below {self.vocab_size}",
                found=int(windows.max()),
                where=self.dir / f"{split}.bin",
                hint="the file is damaged; prepare the data again",
            )
        return windows


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
