"""Documents of the sources, read piece by piece.

A piece of a plain file is a range of its bytes; the documents that begin in the range belong to it. So the documents do
not depend on how a file is cut into pieces.
"""

import contextlib
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from minillm_core.data.chunks import CHUNK_BYTES, Chunk, Chunker, DocumentChunks, framed
from minillm_core.data.sources import Source
from minillm_core.errors import InputError, missing_package

LONGEST_LINE = 1 << 26
"""Bytes of a line of JSON."""
EMPTY = "the file is empty"
ROWS = 1000
"""Rows of a parquet file that are read at a time."""


@dataclass(frozen=True)
class Format:
    """How documents are found in a file."""

    text_field: str = "text"
    """The field of a line of JSON, or the column of a parquet file, with the text."""
    separator: bytes = b""
    """What stands between two documents of a text file; empty: a file is one document."""


PLAIN = Format()
"""Texts of a file each, or in the field `text`."""


@dataclass(frozen=True)
class Piece:
    """What one worker reads at a time: a range of a source, or what was read from a compressed one."""

    source: int
    start: int
    """In bytes of the source or, in a parquet file, in groups of rows."""
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
        yield from _of_lines(piece.source, io.BytesIO(piece.lines), piece.start, how.text_field)
    elif source.format == "parquet":
        yield from _of_rows(piece, source, how.text_field)
    elif source.format == "jsonl":
        with source.path.open("rb") as file:
            start = _line_start(file, piece.start, piece.stop)
            yield from _of_lines(piece.source, file, start, how.text_field, piece.stop)
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
        if not block:
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


def _of_lines(source: int, file: BinaryIO, offset: int, field: str, stop: int | None = None) -> Iterator[Chunk]:
    """The documents of the lines that begin before `stop`. Lines without anything are left out."""
    while (stop is None or offset < stop) and (line := file.readline(LONGEST_LINE + 1)):
        size = len(line)
        if size > LONGEST_LINE and not line.endswith(b"\n"):
            while (part := file.readline(CHUNK_BYTES)) and not part.endswith(b"\n"):
                size += len(part)
            size += len(part)
            yield bad(source, offset, f"the line has more than {LONGEST_LINE:,} bytes")
        elif line.strip():
            yield from _of_json(source, offset, line, field)
        offset += size


def _of_json(source: int, offset: int, line: bytes, field: str) -> Iterator[Chunk]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        yield bad(source, offset, f"not JSON: {str(error)[:100]}")
        return
    if not isinstance(row, dict) or field not in row:
        keys = ", ".join(row)[:100] if isinstance(row, dict) else type(row).__name__
        yield bad(source, offset, f"no field `{field}`, but {keys or 'nothing'}")
        return
    yield from of_text(source, offset, row[field])


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
    if len(data) <= CHUNK_BYTES:
        yield Chunk(source, offset, data, begins=True, ends=True)
    else:
        yield from DocumentChunks(source, offset).finish(data)


def bad(source: int, offset: int, problem: str) -> Chunk:
    """A document that cannot be used."""
    return Chunk(source, offset, b"", begins=True, ends=True, problem=problem)


def _of_rows(piece: Piece, source: Source, column: str) -> Iterator[Chunk]:
    with opened_parquet(source, column) as file:
        row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(ROWS, row_groups=groups, columns=[column]):
            for text in _values(batch.column(0)):
                yield from of_text(piece.source, row, text)
                row += 1


def _values(column: Any) -> Iterator[Any]:
    """The values of a column; texts as bytes, because they may not be UTF-8 in a damaged file."""
    arrow = importlib.import_module("pyarrow")
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        column = column.cast(arrow.large_binary())
    yield from column.to_pylist()


@contextlib.contextmanager
def opened_parquet(source: Source, column: str) -> Iterator[Any]:
    """A parquet file.

    Raises:
        InputError: it is damaged, or has no column of texts with that name; or pyarrow is missing.
    """
    try:
        parquet, arrow = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise missing_package(error, "data", where=source.path) from error
    try:
        with parquet.ParquetFile(source.path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                hint = "choose one of these with --text-field"
                found = ", ".join(file.schema_arrow.names)[:200]
                raise InputError(f"no column `{column}`", found=found, where=source.path, hint=hint)
            yield file
    except (arrow.ArrowException, OSError) as error:
        hint = "get the file again"
        raise InputError("damaged parquet file", found=str(error)[:200], where=source.path, hint=hint) from error
