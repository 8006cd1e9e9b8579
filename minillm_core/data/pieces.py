"""Sources in pieces of about the same size, for workers that read independently of each other."""

import lzma
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

from minillm_core.data.chunks import CHUNK_BYTES, LONGEST_TEXT, Chunk, DocumentChunks, bad
from minillm_core.data.documents import (
    EMPTY,
    PLAIN,
    Format,
    Piece,
    between_separators,
    read_piece,
)
from minillm_core.data.sources import Source
from minillm_core.data.tables import is_table, row_ranges
from minillm_core.errors import InputError
from minillm_core.progress import progress


def pieces_of(index: int, source: Source, how: Format, size: int) -> Iterator[Piece]:
    """A source in pieces of about `size` bytes, a multiple of CHUNK_BYTES.

    Raises:
        InputError: the file is damaged; for a compressed file, possibly after some of its pieces.
    """
    if is_table(source):
        ranges = row_ranges(source, how.text_field, size)
        for start, stop in ranges:
            yield Piece(index, start, stop, source.n_bytes * (stop - start) // ranges[-1][1])
    elif is_stream(source, how):
        yield from _of_stream(index, source, how, size)
    else:
        end = source.start + source.n_bytes
        for start in range(source.start, max(end, source.start + 1), size):
            stop = min(start + size, end)
            yield Piece(index, start, stop, stop - start)


def is_stream(source: Source, how: Format) -> bool:
    """Whether a source can only be read from its beginning."""
    overlaps = source.format == "text" and source.split is None and overlaps_itself(how.separator)
    return bool(source.compression) or overlaps


def overlaps_itself(separator: bytes) -> bool:
    """Whether two occurrences of a separator can overlap: then a range of a file does not show where they are."""
    return any(separator.startswith(separator[i:]) for i in range(1, len(separator)))


def _of_stream(index: int, source: Source, how: Format, size: int) -> Iterator[Piece]:
    """The pieces of a file that can only be read from its beginning. What was read before damage is kept."""
    with source.opened() as (stream, file):
        if not cast(Any, stream).peek(1):
            yield Piece(index, 0, 0, source.n_bytes, chunks=(bad(index, 0, EMPTY),))
            return
        chunks_or_lines = _chunks(index, stream, how) if source.format == "text" else _whole_lines(stream)
        found: list[Any] = []
        start, n_bytes, passed = 0, 0, 0

        def piece() -> Piece:
            nonlocal start, n_bytes, passed
            stop, before = start + n_bytes, passed
            passed = file.tell()
            is_text = source.format == "text"
            chunks, lines = (tuple(found), None) if is_text else (None, b"".join(found))
            found.clear()
            begin, start, n_bytes = start, stop, 0
            return Piece(index, begin, stop, passed - before, lines, chunks)

        try:
            for part in chunks_or_lines:
                found.append(part)
                n_bytes += len(part.data if isinstance(part, Chunk) else part)
                if n_bytes >= size:
                    yield piece()
        except (EOFError, OSError, zlib.error, lzma.LZMAError):
            if found:
                yield piece()
            raise
        if found:
            yield piece()


def _whole_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Blocks of whole lines. A line that is longer than the limit may be cut: it cannot be read in any case."""
    tail = b""
    while block := stream.read(CHUNK_BYTES):
        cut = block.rfind(b"\n") + 1
        if cut or len(tail) > LONGEST_TEXT:
            yield tail + block[:cut]
            tail = block[cut:]
        else:
            tail += block
    if tail:
        yield tail


def _chunks(source: int, stream: BinaryIO, how: Format) -> Iterator[Chunk]:
    if how.separator:
        yield from between_separators(source, stream, how.separator)
        return
    document = DocumentChunks(source, 0)
    while block := stream.read(CHUNK_BYTES):
        yield from document.feed(block)
    yield from document.finish(b"")


def text_chunks(source: Source, how: Format = PLAIN) -> Iterator[str]:
    """The text of all documents of a source, in chunks.

    Raises:
        InputError: a document is not UTF-8 text, or cannot be read.
    """
    for piece in pieces_of(0, source, how, CHUNK_BYTES):
        yield from _texts_of(piece, source, how)


def read_texts(sources: Sequence[Source], how: Format = PLAIN) -> Iterator[str]:
    """The text of all documents of all sources, in chunks, with progress. It raises what `text_chunks` raises."""
    with progress("reading the text", sum(source.n_bytes for source in sources), "B") as work:
        for source in sources:
            end = work.done + source.n_bytes
            for piece in pieces_of(0, source, how, CHUNK_BYTES):
                yield from _texts_of(piece, source, how)
                work.advance(piece.n_bytes)
            work.advance(end - work.done)  # the bytes of pieces of tables are rounded


def _texts_of(piece: Piece, source: Source, how: Format) -> Iterator[str]:
    for chunk in read_piece(piece, [source], how):
        if chunk.problem:
            hint = "correct the file; the field with the text is chosen with --text-field"
            hint = hint if source.format != "text" else "correct the file"
            raise InputError("a document cannot be used", found=chunk.problem, where=source.path, hint=hint)
        try:
            yield chunk.data.decode("utf-8")
        except UnicodeDecodeError as error:
            hint = "convert it to UTF-8"
            raise InputError("not UTF-8 text", found=error, where=source.path, hint=hint) from error
