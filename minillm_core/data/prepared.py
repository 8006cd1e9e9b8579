"""Prepared data: the tokens of one folder, and their order in training."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.data.batches import Batch
from minillm_core.data.foreign_tokens import foreign_index
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

    @property
    def hash(self) -> str:
        """Identifies the tokens. For one file, it is that of the file."""
        joined = "".join(self.hashes).encode()
        return self.hashes[0] if len(self.hashes) == 1 else hashlib.sha256(joined).hexdigest()


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
            if version != (0 if foreign else 2 if path.name == INDEX else 1):
                raise ValueError(f"format version {version}")
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
        self.end_id = _end_id(self.tokenizer) if document_mask else None
        self._n_documents: dict[str, int] = {}

    def _described(self, split: str) -> Split:
        described = self.index[split]
        shards = described.get("shards") or [{**described, "name": f"{split}.bin"}]  # format 1 has one file
        if described["n_bytes"] is not None and described["n_bytes"] < 1:
            raise ValueError("n_bytes is not positive")
        files = tuple(TokenFile(self.dir / shard["name"], int(shard["n_tokens"])) for shard in shards)
        return Split(files, tuple(shard["sha256"] for shard in shards), described["n_bytes"])

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
        pairs = [pair for split in self.splits.values() for pair in zip(split.files, split.hashes, strict=True)]
        if sum(file.path.stat().st_size for file, _ in pairs) > VERIFIED_BYTES:
            ends = [(split.files[i], split.hashes[i]) for split in self.splits.values() for i in (0, -1)]
            logger.info(f"checking {len(ends)} of {len(pairs)} data files; `minillm inspect-data` checks all of them")
            pairs = ends
        pairs = [] if self.index["format_version"] == 0 else pairs  # the token files of other projects have no hashes
        found = hash_files([file.path for file, _ in pairs], "checking the data")
        changed = [file.path for (file, digest), own in zip(pairs, found, strict=True) if own != digest]
        if hash_tokenizer(self.dir) != self.index["tokenizer_sha256"]:
            names = [name for name in (TOKENIZER_MODEL, TOKENIZER_JSON) if (self.dir / name).is_file()]
            changed.append(self.dir / (names or [TOKENIZER_MODEL])[0])
        if changed:
            problem = "a data file is missing or was changed after it was prepared"
            raise InputError(problem, where=changed[0], hint=redo_hint(self.dir))

    def n_tokens(self, split: str) -> int:
        return len(self.tokens[split])

    def n_targets(self, split: str) -> int:
        """Tokens that are predicted: all but the first; with a document mask, all but the first of each document."""
        if self.end_id is None:
            return self.n_tokens(split) - 1
        if split not in self._n_documents:
            n_documents, tokens = self.index[split].get("n_documents"), self.tokens[split]
            if n_documents is None:  # data of version 0.1, or of other projects
                n_documents = 0
                with progress("counting documents", len(tokens), "token") as work:
                    for at in range(0, len(tokens), SCANNED):
                        part = tokens[at : at + SCANNED]
                        n_documents += int((part == self.end_id).sum())
                        work.advance(len(part))
            self._n_documents[split] = int(n_documents)
        return self.n_tokens(split) - self._n_documents[split]

    def targets_of_parts(self, split: str) -> dict[str, int]:
        return {"": self.n_targets(split)}

    def tokens_per_byte(self, split: str) -> float | None:
        n_bytes = self.splits[split].n_bytes
        return None if n_bytes is None else self.n_targets(split) / n_bytes

    def train_rows(self, numbers: np.ndarray, batch_size: int, seq_len: int, seed: int) -> np.ndarray:
        """The split is cut into windows of seq_len tokens; each epoch visits every window once, in an order drawn from
        (seed, epoch). Memory does not grow with the size of the data."""
        n_windows = self._count_windows("train", seq_len)
        epoch, index = numbers // n_windows, numbers % n_windows
        for e in np.unique(epoch):
            index[epoch == e] = permute(index[epoch == e], n_windows, (seed, int(e)))
        return self._read("train", index * seq_len, seq_len)

    def eval_batches(self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None) -> Iterator[Batch]:
        """The split in order, every token except the first predicted once; or `n_batches` spread evenly over it.

        Each window starts without context. The last batch is padded; the padding has weight 0.
        """
        n_targets = len(self.tokens[split]) - 1
        starts = np.arange(0, n_targets, seq_len)
        if n_batches is not None and n_batches * batch_size < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, n_batches * batch_size).astype(int)]
        for first in range(0, len(starts), batch_size):
            rows = starts[first : first + batch_size]
            rows = np.concatenate([rows, np.full(batch_size - len(rows), n_targets)])
            is_target_BT = rows[:, None] + np.arange(seq_len) < n_targets
            batch = self.as_batch(self._read(split, rows, seq_len))
            yield replace(batch, weights_BT=np.where(is_target_BT, batch.weights_BT, np.float32(0)))

    def n_eval_batches(self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None) -> int:
        n_windows = -(-(len(self.tokens[split]) - 1) // seq_len)
        n_all = -(-n_windows // batch_size)
        return n_all if n_batches is None else min(n_batches, n_all)

    def eval_parts(
        self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None
    ) -> dict[str, Iterator[Batch]]:
        return {"": self.eval_batches(split, batch_size, seq_len, n_batches)}

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
        return self.tokens[split].windows(starts, seq_len + 1, self.vocab_size)
