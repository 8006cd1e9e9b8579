"""Documents to token ids: what one worker does with the pieces of a task.

As a program (`python -m minillm_core.data.encode`), it is a worker process: it reads pickled tasks from its standard
input, and answers each on its standard output. It ends when its input ends, so no worker outlives its parent.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.data.chunks import CHUNK_BYTES, Chunk, bad
from minillm_core.data.conversations import messages_of
from minillm_core.data.documents import Format, Piece, read_piece
from minillm_core.data.marks import COUNTED, FIRST
from minillm_core.data.sources import Source
from minillm_core.errors import InputError
from minillm_core.files import flush
from minillm_core.text.chat_template import ChatTemplate
from minillm_core.text.template_process import TemplateEndedError
from minillm_core.text.tokenizer_json import load_tokenizer

BEGINS, ENDS, BAD = 1, 2, 4

Problems = Sequence[tuple[int, int, str]]

ROW = np.dtype(
    [("hash", "<u8", 2), ("n_tokens", "<u4"), ("n_bytes", "<u4"), ("source", "<u4"), ("flags", "<u4")], align=True
)
"""One chunk of a document: the hash of its text, its size, its source; whether it begins and ends its document."""

LINES = re.compile(r"[^\n]*\n|[^\n]+")

LAST = "last"
"""Ending of the name of the last block of a task. Those before it have numbers, which sort before it."""
BLOCK_TEXT = 1 << 25
"""Bytes of text in one block, about: a task with a document of any size needs little memory."""
CHUNK_COST = 500
"""Bytes that a chunk counts in addition to its text, about what its row takes in memory."""


@dataclass(frozen=True)
class Work:
    """What is the same for all tasks of a preparation."""

    sources: tuple[Source, ...]
    stamps: tuple[tuple[int, int, int], ...]
    """Source.stamp() of each source when the preparation began."""
    how: Format
    tokenizer: Path
    """A folder with the tokenizer's files."""
    vocab_size: int
    dtype: str


@dataclass(frozen=True)
class Block:
    """Tokens of a task, and what is known about its documents."""

    tokens: np.ndarray
    rows: np.ndarray
    """ROW, one for each chunk, in order."""
    problems: tuple[tuple[int, int, str], ...]
    """Source, offset, and problem of each document that cannot be used."""
    n_before: int = 0
    """In the last block of a task: how many blocks are before it."""
    marks: np.ndarray | None = None
    """Of conversations: the mark of each token."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a chunk."""

    ids: np.ndarray
    problem: str = ""
    """Why its document cannot be used."""
    marks: np.ndarray | None = None
    """Of a conversation: the mark of each token."""


class Encoder:
    """Encodes the pieces of tasks."""

    def __init__(self, work: Work, n_threads: int = -1):
        """
        Args:
            n_threads: threads of the tokenizer; -1: one for every CPU.
        """
        self.work, self._n_threads = work, n_threads
        self.tokenizer = load_tokenizer(work.tokenizer, work.vocab_size)
        self._before = self.tokenizer.encode("", bos=True)
        self._template = ChatTemplate.of(self.tokenizer) if work.how.chat else None

    def encode(self, pieces: Sequence[Piece]) -> Iterator[Block]:
        """At least one block.

        Raises:
            InputError: a source changed since the preparation began, or cannot be read.
        """
        found, rows, n_bytes = list[Encoded](), list[Any](), 0
        problems: list[tuple[int, int, str]] = []
        for chunks in _groups(chain.from_iterable(self._read(piece) for piece in pieces)):
            if n_bytes >= BLOCK_TEXT:
                yield self._block(found, rows, problems)
                found, rows, n_bytes, problems = [], [], 0, []
            encoded = self._encode_texts(chunks) if self._template is None else map(self._encode_conversation, chunks)
            for chunk, own in zip(chunks, encoded, strict=True):
                n_bytes += len(chunk.data) + CHUNK_COST
                if own.problem:
                    problems.append((chunk.source, chunk.offset, own.problem))
                flags = BEGINS * chunk.begins + ENDS * chunk.ends + BAD * bool(own.problem)
                digest = hashlib.blake2b(chunk.data, digest_size=16).digest()
                rows.append((np.frombuffer(digest, "<u8"), len(own.ids), len(chunk.data), chunk.source, flags))
                found.append(own)
        yield self._block(found, rows, problems)

    def _block(self, found: Sequence[Encoded], rows: list[Any], problems: list[tuple[int, int, str]]) -> Block:
        tokens = np.concatenate([np.empty(0, self.work.dtype), *(own.ids for own in found)])
        marks = [np.empty(0, np.uint8), *(own.marks for own in found if own.marks is not None)]
        all_marks = None if self._template is None else np.concatenate(marks)
        return Block(tokens, np.array(rows, ROW), tuple(problems), marks=all_marks)

    def _read(self, piece: Piece) -> Iterator[Chunk]:
        source = self.work.sources[piece.source]
        try:
            yield from read_piece(piece, self.work.sources, self.work.how)
        except InputError as error:  # a damaged part of a table
            yield bad(piece.source, piece.start, " ".join(str(error).split()))
        if source.stamp() != self.work.stamps[piece.source]:
            hint = "give the command again when nothing writes to the file"
            raise InputError("a source changed while it was read", where=source.path, hint=hint)

    def _encode_texts(self, chunks: Sequence[Chunk]) -> Iterator[Encoded]:
        """Each chunk, with the tokens before and after a document."""
        texts, problems = zip(*map(_text_of, chunks), strict=True)
        if self.tokenizer.splits_at_newlines:
            parts = [LINES.findall(text) for text in texts]
            found = iter(self.tokenizer.encode_many([line for lines in parts for line in lines], self._n_threads))
            encoded = [list(chain.from_iterable(next(found) for _ in lines)) for lines in parts]
        else:
            whole = [i for i, chunk in enumerate(chunks) if chunk.begins]
            encoded = [[] for _ in texts]
            for i, ids in zip(
                whole, self.tokenizer.encode_many([texts[i] for i in whole], self._n_threads), strict=True
            ):
                encoded[i] = ids
            for i in sorted({*range(len(texts))} - {*whole}):
                encoded[i] = self.tokenizer.encode_after("\n", texts[i])
        for chunk, problem, ids in zip(chunks, problems, encoded, strict=True):
            before, after = self._before * chunk.begins, [self.tokenizer.eos_id] * chunk.ends
            yield Encoded(np.array([*before, *ids, *after], self.work.dtype), problem)

    def _encode_conversation(self, chunk: Chunk) -> Encoded:
        """The tokens that the template gives, and no others."""
        assert self._template is not None
        ids, is_reply, problem = list[int](), list[bool](), chunk.problem
        try:
            if not problem:
                ids, is_reply = self._template.encode_training(messages_of(chunk.data))
        except TemplateEndedError:
            raise  # it may be the load of the machine, and must not change the data
        except InputError as error:  # for example, a template that wants another order of the roles
            problem = " ".join(str(error).split())
        marks = np.array(is_reply, np.uint8) * COUNTED
        marks[:1] = FIRST
        if not problem and not (marks & COUNTED).any():
            problem = "no reply of the assistant"
        return Encoded(np.array(ids, self.work.dtype), problem, marks)


def _groups(chunks: Iterator[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks in groups of about 1 MiB: one call of the tokenizer for each."""
    group, n_bytes = list[Chunk](), 0
    for chunk in chunks:
        group.append(chunk)
        n_bytes += len(chunk.data) + CHUNK_COST
        if n_bytes >= CHUNK_BYTES:
            yield group
            group, n_bytes = [], 0
    if group:
        yield group


def _text_of(chunk: Chunk) -> tuple[str, str]:
    """The text of a chunk, and why it cannot be used (empty if it can)."""
    if chunk.problem:
        return "", chunk.problem
    if b"\0" in chunk.data:
        return "", "a NUL byte"
    if not chunk.data and chunk.begins and chunk.ends:
        return "", "no text"
    try:
        return chunk.data.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: {error.reason}"


def write_blocks(path: Path, blocks: Iterator[Block]) -> Problems:
    """Writes the blocks of a task: the last one to `path`, when all others are written.

    Returns:
        the problems of all its documents.
    """
    block, n_before = next(blocks), 0
    problems = list(block.problems)
    for following in blocks:
        _write_block(_path_before(path, n_before), block)
        block, n_before = following, n_before + 1
        problems += block.problems
    _write_block(path, dataclasses.replace(block, n_before=n_before))
    return problems


def blocks_of(path: Path) -> list[Path]:
    """All blocks of a finished task, in order.

    Raises:
        InputError: a file is damaged.
    """
    return [*(_path_before(path, number) for number in range(read_block(path, tokens=False).n_before)), path]


def _path_before(path: Path, number: int) -> Path:
    return path.with_name(path.name.removesuffix(LAST) + f"{number:06}")


def _write_block(path: Path, block: Block) -> None:
    content = io.BytesIO()
    problems = np.frombuffer(json.dumps(block.problems).encode(), np.uint8)
    marks: dict[str, Any] = {} if block.marks is None else {"marks": block.marks}
    np.savez(content, tokens=block.tokens, rows=block.rows, problems=problems, n_before=block.n_before, **marks)
    # With the number of the process: a worker whose parent was killed may still write the same block.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.getbuffer())
    flush(partial)
    partial.replace(path)


def read_block(path: Path, *, tokens: bool = True) -> Block:
    """
    Args:
        tokens: whether to read the tokens and their marks too.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with np.load(path) as content:
            problems = tuple(map(tuple, json.loads(content["problems"].tobytes())))
            found = content["tokens"] if tokens else np.empty(0)
            marks = content["marks"] if tokens and "marks" in content else None
            return Block(found, content["rows"], problems, int(content["n_before"]), marks)
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        hint = "remove this file, and give the command again"
        raise InputError("damaged part of a preparation", found=error, where=path, hint=hint) from error


def serve() -> None:
    """Answers tasks until the input ends."""
    tasks, answers = sys.stdin.buffer, sys.stdout.buffer
    encoder = Encoder(pickle.load(tasks), n_threads=1)
    while True:
        try:
            path, pieces = pickle.load(tasks)
        except EOFError:
            return
        answer: Any
        try:
            answer = write_blocks(path, encoder.encode(pieces))
        except Exception as error:
            answer = error
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:  # the parent was killed
            os._exit(0)


if __name__ == "__main__":
    serve()
