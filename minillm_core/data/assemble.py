"""Encoded documents to prepared data: held-out documents, duplicates, shards, the index of the documents."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.data.encode import BAD, BEGINS, ENDS, read_block
from minillm_core.data.marks import COUNTED, marks_path
from minillm_core.data.prepared import SPLITS
from minillm_core.progress import steps

TRAIN, VAL, DUPLICATE, BAD_DOCUMENT = range(4)

DOCUMENT = np.dtype([("stop", "<u8"), ("n_bytes", "<u8"), ("source", "<u8")])
"""A document in the index of a split: where its tokens end, the bytes of its text, the number of its source."""

LARGEST_HASH = (1 << 64) - 1

SHARD_TOKENS = 1 << 26
"""Tokens of every shard except the last one."""
DOCUMENTS_AT_A_TIME = 1 << 22
"""Duplicates are searched for among about this many documents at a time."""


@dataclass(frozen=True)
class Holdout:
    """Which documents are held out."""

    share: float | None = None
    """Those whose hash is in this share of all hashes; at least one. So it depends only on the text of a document."""
    n_tokens: int | None = None
    """Those with the least hashes, as many as have at most this many tokens together."""
    every: int | None = None
    """Every n-th document."""


@dataclass(frozen=True)
class Table:
    """Some documents, in order: one row for each."""

    hash: np.ndarray
    """(n, 2), uint64."""
    n_tokens: np.ndarray
    source: np.ndarray
    is_bad: np.ndarray


def document_tables(blocks: Sequence[Path]) -> Iterator[Table]:
    """The documents of all blocks, in order; at each step those that end in one block."""
    begun: list[np.void] = []
    for path in steps(blocks, "looking at the documents", "block"):
        rows = read_block(path, tokens=False).rows
        begins, ends = (rows["flags"] & BEGINS) > 0, (rows["flags"] & ENDS) > 0
        if not begun and begins.all() and ends.all():
            yield Table(rows["hash"], rows["n_tokens"], rows["source"], (rows["flags"] & BAD) > 0)
            continue
        found = []
        for row in rows:
            if row["flags"] & BEGINS and begun:
                found.append(_document(begun))
                begun.clear()
            begun.append(row)
            if row["flags"] & ENDS:
                found.append(_document(begun))
                begun.clear()
        yield _table(found)
    if begun:
        yield _table([_document(begun)])


def _document(rows: Sequence[np.void]) -> tuple[Any, int, int, bool]:
    """A document from its chunks. If its end was never read, it is bad."""
    filled = [row for row in rows if row["n_bytes"]]  # a piece of a file may have nothing of its last document
    digest = (filled or rows)[0]["hash"]
    if len(filled) > 1:
        joined = hashlib.blake2b(b"".join(row["hash"].tobytes() for row in filled), digest_size=16).digest()
        digest = np.frombuffer(joined, "<u8")
    is_bad = not rows[-1]["flags"] & ENDS or any(row["flags"] & BAD for row in rows)
    return digest, sum(int(row["n_tokens"]) for row in rows), int(rows[0]["source"]), bool(is_bad)


def _table(documents: Sequence[tuple[Any, int, int, bool]]) -> Table:
    hashes, n_tokens, source, is_bad = zip(*documents, strict=True) if documents else ((), (), (), ())
    return Table(
        np.array(hashes, "<u8").reshape(-1, 2),
        np.array(n_tokens, "<u8"),
        np.array(source, "<u8"),
        np.array(is_bad, bool),
    )


def assign(
    blocks: Sequence[Path], fixed: Sequence[str | None], holdout: Holdout, *, drop_duplicates: bool
) -> np.ndarray:
    """TRAIN, VAL, DUPLICATE or BAD_DOCUMENT for every document, uint8.

    Args:
        fixed: for each source, the split of its documents, or None.

    Raises:
        InputError: no document is left for one of the splits.
    """
    parts = [np.where(table.is_bad, BAD_DOCUMENT, TRAIN).astype(np.uint8) for table in document_tables(blocks)]
    if drop_duplicates:
        _drop_duplicates(blocks, parts)
    threshold = _threshold(blocks, parts, holdout)
    splits = np.array([-1 if split is None else SPLITS.index(split) for split in fixed])
    n_before = 0
    for table, part in zip(document_tables(blocks), parts, strict=True):
        kept = part == TRAIN
        if holdout.every is not None:
            number = n_before + np.cumsum(kept) - 1
            is_held_out = number % holdout.every == holdout.every - 1
            n_before += int(kept.sum())
        else:
            is_held_out = table.hash[:, 0] < np.uint64(threshold)
        own = splits[table.source.astype(np.int64)]
        part[kept] = np.where(own >= 0, own, np.where(is_held_out, VAL, TRAIN))[kept]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def _threshold(blocks: Sequence[Path], parts: Sequence[np.ndarray], holdout: Holdout) -> int:
    """The hash below which documents are held out; at least one is, however small the share."""
    hashes, sizes, threshold = np.empty(0, "<u8"), np.empty(0, "<u8"), LARGEST_HASH
    if holdout.every is not None:
        return 0
    least = LARGEST_HASH
    for table, part in zip(document_tables(blocks), parts, strict=True):
        kept = table.hash[part == TRAIN, 0]
        least = min(least, int(kept.min(initial=LARGEST_HASH)))
        if holdout.n_tokens is None:
            continue
        # of the documents so far, those with the least hashes, as long as they have few enough tokens together
        hashes, sizes = np.append(hashes, kept), np.append(sizes, table.n_tokens[part == TRAIN])
        order = np.argsort(hashes, kind="stable")
        hashes, sizes = hashes[order], sizes[order]
        n = int(np.searchsorted(np.cumsum(sizes), holdout.n_tokens, side="right"))
        threshold = min([threshold, *map(int, hashes[n : n + 1])])
        hashes, sizes = hashes[:n], sizes[:n]
    if holdout.share is not None:
        threshold = max(min(int(holdout.share * 2**64), LARGEST_HASH), min(least + 1, LARGEST_HASH))
    return threshold


def _drop_duplicates(blocks: Sequence[Path], parts: Sequence[np.ndarray]) -> None:
    """Marks every document whose text occurred before. The hashes are compared in classes, one after the other, so that
    the memory is limited."""
    n_classes = -(-sum(map(len, parts)) // DOCUMENTS_AT_A_TIME)
    for number in range(n_classes):
        seen: set[bytes] = set()
        for table, part in zip(document_tables(blocks), parts, strict=True):
            for i in np.flatnonzero((table.hash[:, 1] % n_classes == number) & (part == TRAIN)).tolist():
                digest = table.hash[i].tobytes()
                if digest in seen:
                    part[i] = DUPLICATE
                seen.add(digest)


class _File:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path):
        self._file, self._digest = path.open("wb"), hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        """Returns the SHA-256 of the file."""
        self._file.close()
        return self._digest.hexdigest()


class _Writer:
    """Writes the shards of a split, and its index of documents."""

    def __init__(self, folder: Path, split: str, has_marks: bool):
        self._folder, self._split, self._has_marks = folder, split, has_marks
        self._files: dict[str, _File] = {}
        """The files of the shard that is being written, by the names of their hashes."""
        self._documents = (folder / f"{split}.documents").open("wb")
        self._documents_digest = hashlib.sha256()
        self.shards: list[dict[str, Any]] = []
        self.n_tokens = self.n_counted = self.n_bytes = self.n_documents = 0

    def write(self, tokens: np.ndarray, marks: np.ndarray | None) -> None:
        start = 0
        while start < len(tokens):
            room = SHARD_TOKENS - self.n_tokens % SHARD_TOKENS
            if room == SHARD_TOKENS:
                self._end_shard()
                name = f"{self._split}-{len(self.shards):05}.bin"
                self._files["sha256"] = _File(self._folder / name)
                if self._has_marks:
                    self._files["marks_sha256"] = _File(marks_path(self._folder / name))
                self.shards.append({"name": name, "n_tokens": 0})
            part = tokens[start : start + room]
            self._files["sha256"].write(part)
            if marks is not None:
                self._files["marks_sha256"].write(marks[start : start + room])
                self.n_counted += int(((marks[start : start + room] & COUNTED) > 0).sum())
            self.shards[-1]["n_tokens"] += len(part)
            self.n_tokens += len(part)
            start += len(part)

    def end_documents(self, stops: np.ndarray, n_bytes: np.ndarray, sources: np.ndarray) -> None:
        """
        Args:
            stops: for each document that has been written, the number of tokens up to its end.
        """
        documents = np.empty(len(stops), DOCUMENT)
        documents["stop"], documents["n_bytes"], documents["source"] = stops, n_bytes, sources
        self._documents.write(documents.tobytes())
        self._documents_digest.update(documents.tobytes())
        self.n_documents += len(stops)
        self.n_bytes += int(n_bytes.sum())

    def close(self) -> None:
        self._end_shard()
        self._documents.close()

    def _end_shard(self) -> None:
        for name, file in self._files.items():
            self.shards[-1][name] = file.close()
        self._files = {}

    def described(self) -> dict[str, Any]:
        return {
            "n_tokens": self.n_tokens,
            **({"n_counted": self.n_counted} if self._has_marks else {}),
            "n_bytes": self.n_bytes,
            "n_documents": self.n_documents,
            "documents_sha256": self._documents_digest.hexdigest(),
            "shards": self.shards,
        }


def write_shards(
    blocks: Sequence[Path], splits: np.ndarray, folder: Path, *, has_marks: bool
) -> dict[str, dict[str, Any]]:
    """Writes the shards and the index of documents of both splits.

    Args:
        splits: what `assign` returns.
        has_marks: the documents are conversations.

    Returns:
        for each split its sizes and shards.
    """
    with contextlib.ExitStack() as stack:
        writers = [_Writer(folder, split, has_marks) for split in SPLITS]
        for writer in writers:
            stack.callback(writer.close)
        n_begun, open_bytes = 0, 0
        for path in steps(blocks, "writing the shards", "block"):
            block = read_block(path)
            rows = block.rows
            number = n_begun + np.cumsum((rows["flags"] & BEGINS) > 0) - 1
            n_begun = int(number[-1]) + 1 if len(number) else n_begun
            own = splits[number]
            stops = np.cumsum(rows["n_tokens"].astype(np.int64))
            bytes_before = np.cumsum(rows["n_bytes"].astype(np.int64))
            open_bytes = 0 if len(rows) and rows["flags"][0] & BEGINS else open_bytes
            edges = np.flatnonzero(np.diff(own)) + 1
            for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(rows)], strict=True):
                if first == last or own[first] > VAL:
                    continue
                writer = writers[own[first]]
                start, written = int(stops[first] - rows["n_tokens"][first]), writer.n_tokens
                stop = int(stops[last - 1])
                writer.write(block.tokens[start:stop], None if block.marks is None else block.marks[start:stop])
                at = first + np.flatnonzero(rows["flags"][first:last] & ENDS)
                before = int(bytes_before[first] - rows["n_bytes"][first])
                sizes = np.diff(bytes_before[at], prepend=before - (open_bytes if first == 0 else 0))
                writer.end_documents(written + stops[at] - start, sizes, rows["source"][at])
            if len(rows):
                at = np.flatnonzero(rows["flags"] & ENDS)
                tail = bytes_before[-1] - (bytes_before[at[-1]] if len(at) else 0)
                open_bytes = int(tail) + (0 if len(at) else open_bytes)
    return {split: writer.described() for split, writer in zip(SPLITS, writers, strict=True)}
