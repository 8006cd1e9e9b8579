"""Prepared data: the tokens of one folder, and their order in training."""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.data.batches import Batch, Rows, begin_after
from minillm_core.data.foreign_tokens import foreign_index
from minillm_core.data.marks import COUNTED, FIRST, PackedRows, marks_path, pack_rows
from minillm_core.data.order import permute
from minillm_core.data.token_files import TokenFile, TokenFiles
from minillm_core.data.training_data import TrainingData
from minillm_core.errors import InputError
from minillm_core.files import hash_files, user_path
from minillm_core.progress import progress
from minillm_core.text.tokenizer import TOKENIZER_JSON, TOKENIZER_MODEL, Tokenizer, hash_tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
INDEX, OLD_INDEX = "index.json", "meta.json"
MARK_VALUES = 1 << 8
"""A mark is one byte."""
SCANNED = 1 << 24
"""Tokens that are read at a time when documents are counted."""
VERIFIED_BYTES = 4 << 30
"""Of larger data, only the first and the last shard of each split are compared with their hashes."""


def redo_hint(folder: Path) -> str:
    """The hint for a folder that cannot be used."""
    return f"remove {folder} or choose a different --data.dir, then prepare the data again"


@dataclass(frozen=True)
class Split:
    """What the index says about a split."""

    files: tuple[TokenFile, ...]
    hashes: tuple[str, ...]
    """SHA-256 of each file."""
    n_bytes: int | None
    """Bytes of the text; None if they are not known (token files of other projects)."""
    marks_hashes: tuple[str, ...] = ()
    """Of conversations: SHA-256 of the marks of each file."""

    @property
    def hash(self) -> str:
        """Identifies the tokens, and which of them count. For one file without marks, it is that of the file."""
        hashes = (*self.hashes, *self.marks_hashes)
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    @property
    def marks_files(self) -> tuple[TokenFile, ...]:
        """Of conversations: the file with the marks of each file."""
        files = self.files if self.marks_hashes else ()
        return tuple(TokenFile(marks_path(file.path), file.n_tokens) for file in files)

    def hashed(self, shards: slice = slice(None)) -> dict[Path, str]:
        """Every file of some shards, and its SHA-256."""
        files, marks = self.files[shards], self.marks_files[shards]
        paths = [file.path for file in (*files, *marks)]
        return dict(zip(paths, (*self.hashes[shards], *self.marks_hashes[shards]), strict=True))


def _end_id(tokenizer: Tokenizer) -> int:
    """The token that ends a document.

    Raises:
        InputError: it does not show where a document ends.
    """
    if tokenizer.eos_id < 0 or (tokenizer.adds_bos and tokenizer.bos_id == tokenizer.eos_id):
        hint = "leave out --data.document_mask"
        problem = "documents in a row cannot be told apart: the tokenizer has no token of its own for their end"
        raise InputError(problem, where=tokenizer.path, hint=hint)
    return tokenizer.eos_id


class PreparedData(TrainingData):
    """The tokens of one folder of prepared data."""

    def __init__(self, folder: str | Path, vocab_size: int | None, *, document_mask: bool = False):
        """Opens and checks a folder.

        Args:
            vocab_size: that of the model; None: any.
            document_mask: the documents in a row of a batch do not see each other.

        Raises:
            InputError: a file is missing or truncated, or the vocabulary size differs.
        """
        self.dir = user_path(folder)
        redo = redo_hint(self.dir)
        path = self.dir / INDEX if (self.dir / INDEX).is_file() else self.dir / OLD_INDEX
        foreign = None
        if not path.is_file() and vocab_size is not None:
            foreign = foreign_index(self.dir, SPLITS, vocab_size)
        if not path.is_file() and foreign is None:
            hint = "choose a different folder for the prepared data"
            if not self.dir.exists():
                hint = "check the path, or prepare the data first"
            elif (self.dir / "part.json").is_file():
                hint = "it is a part of a preparation (--shard): join all parts with prepare_data.py --merge"
            raise InputError("not a folder of prepared data", expected=INDEX, where=self.dir, hint=hint)
        try:
            self.index: dict[str, Any] = foreign or json.loads(path.read_text(encoding="utf-8"))
            version, found = self.index["format_version"], self.index["vocab_size"]
            if version not in ((0,) if foreign else (2, 3) if path.name == INDEX else (1,)):
                raise ValueError(f"format version {version}")
            self.is_chat: bool = version == 3
            self.splits = {split: self._described(split) for split in SPLITS}
            dtype = str(np.dtype(self.index["dtype"]))
            self.hashes()
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("damaged data file", found=repr(error), where=path, hint=redo) from error
        if vocab_size not in (None, found):
            problem = "the data's vocabulary size differs from the model's"
            hint = f"set --model.vocab_size {found}, or choose a different --data.dir"
            raise InputError(problem, expected=vocab_size, found=found, where=self.dir, hint=hint)
        self.vocab_size: int = found
        self.tokens = {split: TokenFiles(self.splits[split].files, dtype, redo) for split in SPLITS}
        self.marks = {split: TokenFiles(self.splits[split].marks_files, "|u1", redo) for split in SPLITS}
        self.document_mask = document_mask
        self._end_id = _end_id(self.tokenizer) if document_mask and not self.is_chat else None
        self._n_documents: dict[str, int] = {}
        self._packed: dict[tuple[str, int], PackedRows] = {}
        self._packing = threading.Lock()

    def _described(self, split: str) -> Split:
        described = self.index[split]
        shards = described.get("shards") or [{**described, "name": f"{split}.bin"}]  # format 1 has one file
        if described["n_bytes"] is not None and described["n_bytes"] < 1:
            raise ValueError("n_bytes is not positive")
        if self.is_chat and int(described["n_counted"]) < 1:
            raise ValueError("n_counted is not positive")
        files = tuple(TokenFile(self.dir / shard["name"], int(shard["n_tokens"])) for shard in shards)
        marks_hashes = tuple(shard["marks_sha256"] for shard in shards) if self.is_chat else ()
        return Split(files, tuple(shard["sha256"] for shard in shards), described["n_bytes"], marks_hashes)

    @property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.dir, self.vocab_size)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the tokenizer and of both splits, which identify this data; recorded when it was prepared."""
        return {"tokenizer": self.index["tokenizer_sha256"], **{split: self.splits[split].hash for split in SPLITS}}

    def verify(self) -> None:
        """Compares the files with their hashes; of more than VERIFIED_BYTES, only a part of them.

        Raises:
            InputError: a file was changed after it was prepared.
        """
        hashes = {path: digest for split in self.splits.values() for path, digest in split.hashed().items()}
        if sum(path.stat().st_size for path in hashes) > VERIFIED_BYTES:
            ends = [split.hashed(slice(i, i + 1 or None)) for split in self.splits.values() for i in (0, -1)]
            n_all, hashes = len(hashes), {path: digest for part in ends for path, digest in part.items()}
            logger.info(f"checking {len(hashes)} of {n_all} data files; `minillm inspect-data` checks all of them")
        if self.index["format_version"] == 0:
            hashes = {}  # the token files of other projects have none
        found = hash_files([*hashes], "checking the data")
        changed = [path for (path, digest), own in zip(hashes.items(), found, strict=True) if own != digest]
        if hash_tokenizer(self.dir) != self.index["tokenizer_sha256"]:
            names = [name for name in (TOKENIZER_MODEL, TOKENIZER_JSON) if (self.dir / name).is_file()]
            changed.append(self.dir / (names or [TOKENIZER_MODEL])[0])
        if changed:
            problem = "a data file is missing or was changed after it was prepared"
            raise InputError(problem, where=changed[0], hint=redo_hint(self.dir))

    def n_tokens(self, split: str) -> int:
        return len(self.tokens[split])

    def n_targets(self, split: str) -> int:
        """Tokens that are predicted: all but the first; with a document mask, all but the first of each document. Of
        conversations, only those that count."""
        if self.is_chat:
            return int(self.index[split]["n_counted"])
        if self._end_id is None:
            return self.n_tokens(split) - 1
        if split not in self._n_documents:
            n_documents, tokens = self.index[split].get("n_documents"), self.tokens[split]
            if n_documents is None:  # data of version 0.1, or of other projects
                n_documents = 0
                with progress("counting documents", len(tokens), "token") as work:
                    for at in range(0, len(tokens), SCANNED):
                        part = tokens[at : at + SCANNED]
                        n_documents += int((part == self._end_id).sum())
                        work.advance(len(part))
            self._n_documents[split] = int(n_documents)
        return self.n_tokens(split) - self._n_documents[split]

    def targets_of_parts(self, split: str) -> dict[str, int]:
        return {"": self.n_targets(split)}

    def tokens_per_byte(self, split: str) -> float | None:
        n_bytes = self.splits[split].n_bytes
        return None if n_bytes is None or self.is_chat else self.n_targets(split) / n_bytes

    def train_rows(self, numbers: np.ndarray, batch_size: int, seq_len: int, seed: int) -> Rows:
        """The split is cut into windows of seq_len tokens; each epoch visits every window once, in an order drawn from
        (seed, epoch). Memory does not grow with the size of the data.

        Conversations are not cut, but packed into rows, which are visited in the same way. Memory grows by 16 bytes for
        each row.
        """
        n_rows = self._count_rows("train", seq_len)
        epoch, index = numbers // n_rows, numbers % n_rows
        for e in np.unique(epoch):
            index[epoch == e] = permute(index[epoch == e], n_rows, (seed, int(e)))
        return self._read("train", index, seq_len)

    def eval_batches(self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None) -> Iterator[Batch]:
        """The split in order, every token that counts predicted once (of text, every token except the first); or
        `n_batches` spread evenly over it.

        Each window starts without context. The last batch is padded; the padding has weight 0.
        """
        n_rows = self._n_eval_rows(split, seq_len)
        numbers = np.arange(n_rows)
        if n_batches is not None and n_batches * batch_size < n_rows:
            numbers = np.linspace(0, n_rows - 1, n_batches * batch_size).astype(int)
        for first in range(0, len(numbers), batch_size):
            own = numbers[first : first + batch_size]
            rows = self._read(split, np.concatenate([own, np.full(batch_size - len(own), n_rows - 1)]), seq_len)
            rows.counts[len(own) :] = False
            yield Batch.from_prepared(rows)

    def n_eval_batches(self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None) -> int:
        n_all = -(-self._n_eval_rows(split, seq_len) // batch_size)
        return n_all if n_batches is None else min(n_batches, n_all)

    def eval_parts(
        self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None
    ) -> dict[str, Iterator[Batch]]:
        return {"": self.eval_batches(split, batch_size, seq_len, n_batches)}

    def _n_eval_rows(self, split: str, seq_len: int) -> int:
        """The rows of an evaluation: the last window may be shorter than the others."""
        return len(self._rows(split, seq_len).starts) if self.is_chat else -(-(len(self.tokens[split]) - 1) // seq_len)

    def _count_rows(self, split: str, seq_len: int) -> int:
        """The rows of an epoch.

        Raises:
            InputError: there is none.
        """
        if self.is_chat:
            return len(self._rows(split, seq_len).starts)
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

    def _rows(self, split: str, seq_len: int) -> PackedRows:
        """The rows of conversations; computed once for each length."""
        with self._packing:
            if (split, seq_len) not in self._packed:
                self._packed[split, seq_len] = pack_rows(self.marks[split], seq_len)
            return self._packed[split, seq_len]

    def _read(self, split: str, numbers: np.ndarray, seq_len: int) -> Rows:
        """Rows of a split by their numbers."""
        starts, stop = numbers * seq_len, np.array(len(self.tokens[split]))
        if self.is_chat:
            packed = self._rows(split, seq_len)
            starts, stop = packed.starts[numbers], packed.stops[numbers][:, None]
        tokens = self.tokens[split].windows(starts, seq_len + 1, self.vocab_size)
        counts, begins = starts[:, None] + np.arange(seq_len + 1) < stop, None
        if self.is_chat:
            marks = self.marks[split].windows(starts, seq_len + 1, MARK_VALUES)
            counts &= (marks & COUNTED) > 0
            begins = (marks & FIRST) > 0
        elif self._end_id is not None:
            begins = begin_after(tokens, self._end_id)
        return Rows(tokens, counts, begins if self.document_mask else None)
