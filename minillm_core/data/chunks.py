"""A document in chunks of limited size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 1 << 20
"""A longer document is read in chunks of about this size."""
LONGEST_TEXT = 1 << 26
"""Bytes of a line of JSON, or of a text in a table. (A document in a text file can have any size.)"""


@dataclass(frozen=True)
class Chunk:
    """A document, or a part of a long one."""

    source: int
    """Index of its source."""
    offset: int
    """Where its document begins: bytes of the uncompressed source, or rows of a table."""
    data: bytes
    begins: bool
    """Whether it is the beginning of its document."""
    ends: bool
    problem: str = ""
    """Why its document cannot be used; then there is no data."""


class Chunker:
    """Cuts one document into chunks. The cuts depend only on the document: the k-th is after the first line end at or
    after k MiB. If there is none within a MiB, it is before the last space there, or else at k MiB."""

    def __init__(self, first: int = 0):
        """
        Args:
            first: start at `first` MiB instead of at the beginning. The first chunk then belongs to what is before.
        """
        self._buffer = bytearray()
        self._passed = first * CHUNK_BYTES
        self._next = max(first, 1)

    def feed(self, block: bytes) -> Iterator[bytes]:
        """The chunks that are known to be complete after the next bytes of the document."""
        self._buffer += block
        while self._passed + len(self._buffer) >= (self._next + 1) * CHUNK_BYTES:
            yield self._cut(is_last=False)

    def finish(self) -> Iterator[bytes]:
        """The chunks that are left at the end of the document."""
        while self._passed + len(self._buffer) > self._next * CHUNK_BYTES:
            yield self._cut(is_last=True)
        yield bytes(self._buffer)

    def _cut(self, is_last: bool) -> bytes:
        start = self._next * CHUNK_BYTES - self._passed
        window = self._buffer[start : start + CHUNK_BYTES]
        if (at := window.find(b"\n")) >= 0:
            cut = start + at + 1
        elif is_last:
            cut = len(self._buffer)
        elif (at := window.rfind(b" ")) > 0:
            cut = start + at
        else:
            cut = start + next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
        chunk = bytes(self._buffer[:cut])
        del self._buffer[:cut]
        self._passed += cut
        self._next += 1
        return chunk


def framed(
    source: int, offset: int, chunks: Sequence[bytes], *, begins: bool = True, ends: bool = True
) -> Iterator[Chunk]:
    chunks = [chunk for chunk in chunks if chunk] or [b""]
    for number, chunk in enumerate(chunks):
        is_first, is_last = number == 0, number == len(chunks) - 1
        yield Chunk(source, offset, chunk, begins=begins and is_first, ends=ends and is_last)


class DocumentChunks:
    """A document that is read in parts."""

    def __init__(self, source: int, offset: int):
        self._source, self._offset = source, offset
        self._chunker, self._begun = Chunker(), False
        self.n_fed = 0

    def feed(self, data: bytes, *, is_kept: bool = True) -> Iterator[Chunk]:
        self.n_fed += len(data)
        if is_kept:
            for chunk in self._chunker.feed(data):
                yield Chunk(self._source, self._offset, chunk, begins=not self._begun, ends=False)
                self._begun = True

    def finish(self, data: bytes) -> Iterator[Chunk]:
        """The rest of the document; nothing if the whole document is empty."""
        if not data and not self.n_fed:
            return
        chunks = [*self._chunker.feed(data), *self._chunker.finish()]
        yield from framed(self._source, self._offset, chunks, begins=not self._begun)


def of_text(source: int, offset: int, text: Any) -> Iterator[Chunk]:
    """A document from a value that should be a text, or its bytes."""
    if not isinstance(text, (str, bytes)):
        yield bad(source, offset, f"the text is of the type {type(text).__name__}")
        return
    try:
        data = text if isinstance(text, bytes) else text.encode()
    except UnicodeEncodeError:
        yield bad(source, offset, "half of a surrogate pair, which is not text")
        return
    if len(data) > LONGEST_TEXT:
        yield bad(source, offset, f"the text has more than {LONGEST_TEXT:,} bytes")
    elif len(data) <= CHUNK_BYTES:
        yield Chunk(source, offset, data, begins=True, ends=True)
    else:
        yield from DocumentChunks(source, offset).finish(data)


def bad(source: int, offset: int, problem: str) -> Chunk:
    """A document that cannot be used."""
    return Chunk(source, offset, b"", begins=True, ends=True, problem=problem)
