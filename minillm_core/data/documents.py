"""Documents of the sources, read piece by piece.

A piece of a plain file is a range of its bytes; the documents that begin in the range belong to it. So the documents do
not depend on how a file is cut into pieces.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from minillm_core.data.chunks import CHUNK_BYTES, LONGEST_TEXT, Chunk, Chunker, DocumentChunks, bad, framed, of_text
from minillm_core.data.conversations import of_messages
from minillm_core.data.sources import Source
from minillm_core.data.tables import is_table, texts_of

EMPTY = "the file is empty"


@dataclass(frozen=True)
class Format:
    """How documents are found in a file."""

    text_field: str = "text"
    """The field of a line of JSON, or the column of a table, with the text."""
    separator: bytes = b""
    """What stands between two documents of a text file; empty: a file is one document."""
    chat: bool = False
    """Every document is a conversation: the field or column holds its messages, not a text."""


PLAIN = Format()
"""Texts of a file each, or in the field `text`."""
CHAT = Format("messages", chat=True)
"""Conversations in the field `messages`."""


@dataclass(frozen=True)
class Piece:
    """What one worker reads at a time: a range of a source, or what was read from a compressed one."""

    source: int
    start: int
    """In bytes of the source or, in a table, in rows."""
    stop: int
    n_bytes: int
    """Its share of the bytes on disk, for the progress."""
    lines: bytes | None = None
    """Whole lines of a compressed JSON file."""
    chunks: tuple[Chunk, ...] | None = None
    """Chunks of a compressed text file."""


def read_piece(piece: Piece, sources: Sequence[Source], how: Format) -> Iterator[Chunk]:
    """The chunks of a piece, in order. A document that cannot be read is a chunk with a problem."""
    source = sources[piece.source]
    if piece.chunks is not None:
        yield from piece.chunks
    elif not source.n_bytes:
        yield bad(piece.source, 0, EMPTY)
    elif piece.lines is not None:
        yield from _of_lines(piece.source, io.BytesIO(piece.lines), piece.start, how)
    elif is_table(source):
        for row, value in texts_of(source, how.text_field, piece.start, piece.stop):
            yield from _of_value(piece.source, row, value, how)
    elif source.format == "jsonl":
        with source.path.open("rb") as file:
            start = _line_start(file, piece.start, piece.stop)
            yield from _of_lines(piece.source, file, start, how, piece.stop)
    elif how.separator and source.split is None:
        with source.path.open("rb") as file:
            yield from between_separators(piece.source, file, how.separator, piece.start, piece.stop)
    else:
        yield from _of_range(piece, source)


def _of_range(piece: Piece, source: Source) -> Iterator[Chunk]:
    """A part of a document that is a whole source. The piece starts and stops at whole MiBs of the document."""
    end = source.start + source.n_bytes
    first = (piece.start - source.start) // CHUNK_BYTES
    wanted = -(-(piece.stop - piece.start) // CHUNK_BYTES)
    chunker, found = Chunker(first), list[bytes]()
    with source.path.open("rb") as file:
        file.seek(piece.start)
        n_needed = wanted + (first > 0)
        while len(found) < n_needed and (block := file.read(min(CHUNK_BYTES, end - file.tell()))):
            found += chunker.feed(block)
        if len(found) < n_needed or piece.stop >= end:
            found += chunker.finish()
    found = found[1:] if first else found  # what is before the first cut belongs to the piece before
    if piece.stop < end:
        found = found[:wanted]
    yield from framed(piece.source, source.start, found, begins=first == 0, ends=piece.stop >= end)


def between_separators(
    source: int, file: BinaryIO, separator: bytes, start: int = 0, stop: int | None = None
) -> Iterator[Chunk]:
    """The documents that begin in a range of a file. Empty ones are left out."""
    offset = max(0, start - len(separator))  # the separator before a document that begins exactly at `start`
    if offset:
        file.seek(offset)
    is_inside = start == 0
    document = DocumentChunks(source, offset)
    tail = b""
    while True:
        block = file.read(CHUNK_BYTES)
        *complete, tail = (tail + block).split(separator)
        if not block:
            complete, tail = [*complete, tail], b""
        for data in complete:
            if is_inside:
                yield from document.finish(data)
            offset += document.n_fed + len(data) + len(separator)
            is_inside = True
            document = DocumentChunks(source, offset)
            if stop is not None and offset >= stop:
                return
        if not block or (not is_inside and stop is not None and offset + document.n_fed + len(tail) >= stop):
            return
        keep = len(separator) - 1
        if len(tail) > CHUNK_BYTES:
            fed, tail = (tail[:-keep], tail[-keep:]) if keep else (tail, b"")
            yield from document.feed(fed, is_kept=is_inside)


def _line_start(file: BinaryIO, start: int, stop: int) -> int:
    """Moves to the first line that begins at or after `start`; returns its offset. A very long line is not kept."""
    if start == 0:
        return 0
    file.seek(start - 1)
    while file.tell() < stop and (part := file.readline(CHUNK_BYTES)):
        if part.endswith(b"\n"):
            break
    return file.tell()


def _of_lines(source: int, file: BinaryIO, offset: int, how: Format, stop: int | None = None) -> Iterator[Chunk]:
    """The documents of the lines that begin before `stop`. Lines without anything are left out."""
    while (stop is None or offset < stop) and (line := file.readline(LONGEST_TEXT + 1)):
        size = len(line)
        if size > LONGEST_TEXT and not line.endswith(b"\n"):
            while (part := file.readline(CHUNK_BYTES)) and not part.endswith(b"\n"):
                size += len(part)
            size += len(part)
            yield bad(source, offset, f"the line has more than {LONGEST_TEXT:,} bytes")
        elif line.strip():
            yield from _of_json(source, offset, line, how)
        offset += size


def _of_json(source: int, offset: int, line: bytes, how: Format) -> Iterator[Chunk]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        yield bad(source, offset, f"not JSON: {str(error)[:100]}")
        return
    if how.chat and isinstance(row, list):
        row = {how.text_field: row}  # the messages alone
    if not isinstance(row, dict) or how.text_field not in row:
        keys = ", ".join(row)[:100] if isinstance(row, dict) else type(row).__name__
        yield bad(source, offset, f"no field `{how.text_field}`, but {keys or 'nothing'}")
        return
    yield from _of_value(source, offset, row[how.text_field], how)


def _of_value(source: int, offset: int, value: Any, how: Format) -> Iterator[Chunk]:
    """The document of a line of JSON, or of a row of a table."""
    if how.chat:
        yield of_messages(source, offset, value)
    else:
        yield from of_text(source, offset, value)
