"""Token ids in files, read as one long array: the shards of a split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.errors import InputError

MAPPED_FILES = 64
"""Up to so many files are mapped into memory. Of more, each window is read from its file: mapping one takes as long as
reading a hundred windows, and a mapping holds a file descriptor."""


@dataclass(frozen=True)
class TokenFile:
    path: Path
    n_tokens: int


class TokenFiles:
    """The tokens of several files, one after the other. Memory does not grow with their size."""

    def __init__(self, files: Sequence[TokenFile], dtype: str, hint: str):
        """
        Args:
            dtype: type of the ids in the files.
            hint: what to do if a file is damaged.

        Raises:
            InputError: a file is missing, or does not have the size of its tokens.
        """
        self._files, self._dtype, self._hint = tuple(files), np.dtype(dtype), hint
        for file in files:
            expected = file.n_tokens * self._dtype.itemsize
            size: Any = file.path.stat().st_size if file.path.is_file() else "no file"
            if size != expected:
                problem = "missing or truncated data file"
                raise InputError(problem, expected=f"{expected} bytes", found=size, where=file.path, hint=hint)
        self._stops = np.cumsum([file.n_tokens for file in files], dtype=np.int64)
        self._mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._stops[-1]) if self._files else 0

    def __getitem__(self, index: int | slice) -> Any:
        """Tokens, as from an array; a slice without a step."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return self.read(start, max(start, stop))
        at = index + len(self) * (index < 0)
        return self.read(at, at + 1)[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens start:stop, in the dtype of the files."""
        first = int(np.searchsorted(self._stops, start, side="right"))
        parts = []
        while start < stop:
            n_tokens = self._files[first].n_tokens
            begin = int(self._stops[first]) - n_tokens
            parts.append(self._read_part(first, start - begin, min(stop - begin, n_tokens)))
            start, first = start + len(parts[-1]), first + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self._dtype), *parts])

    def windows(self, starts: np.ndarray, length: int, vocab_size: int) -> np.ndarray:
        """Windows of `length` tokens from each start, int32. After the last token, it is repeated.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        # 64-bit ids of other projects are checked before they are cut to 32 bits
        found = np.empty((len(starts), length), np.int32 if self._dtype.itemsize < 4 else np.int64)
        for row, start in enumerate(starts.tolist()):
            part = self.read(min(start, len(self) - 1), min(start + length, len(self)))
            found[row, : len(part)] = part
            found[row, len(part) :] = part[-1]
        if found.size and not 0 <= found.min() <= found.max() < vocab_size:
            bad = int(found.max() if found.max() >= vocab_size else found.min())
            row = int(np.flatnonzero(((found < 0) | (found >= vocab_size)).any(axis=1))[0])
            where = self._files[int(np.searchsorted(self._stops, min(starts[row], len(self) - 1), side="right"))].path
            raise InputError(
                "token id outside the vocabulary",
                expected=f"below {vocab_size}",
                found=bad,
                where=where,
                hint=f"the file is damaged, or belongs to a different tokenizer; {self._hint}",
            )
        return found.astype(np.int32, copy=False)

    def _read_part(self, number: int, start: int, stop: int) -> np.ndarray:
        """Tokens start:stop of one file."""
        if len(self._files) > MAPPED_FILES:
            with self._files[number].path.open("rb", buffering=0) as file:
                file.seek(start * self._dtype.itemsize)
                return np.frombuffer(file.read((stop - start) * self._dtype.itemsize), self._dtype)
        if number not in self._mapped:
            # a plain array over the mapping: slices of np.memmap are slow
            self._mapped[number] = np.asarray(np.memmap(self._files[number].path, self._dtype, mode="r"))
        return self._mapped[number][start:stop]
