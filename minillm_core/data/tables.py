"""Texts in a column of a table: a parquet or an Arrow file. (The package `datasets` keeps its data in Arrow files.)"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from minillm_core.data.sources import Source
from minillm_core.errors import InputError, missing_package

ROWS = 1000
"""Most rows of one read."""
READ_BYTES = 1 << 22
"""Approximate bytes of text of one read."""
RANGE_ROWS = 100_000
"""Most rows of a range, as far as MOST_RANGES allows: a column may hold many empty or repeated texts in few bytes."""
MOST_RANGES = 16
"""Most ranges of a row group, or of an Arrow file: to read a range, the group is decoded from its beginning."""
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of an Arrow stream. Without them, the reader takes a stream that is cut off for a whole one."""


def is_table(source: Source) -> bool:
    return source.format in ("parquet", "arrow")


@dataclass(frozen=True)
class _Group:
    """A row group of a parquet file, or a record batch of an Arrow file."""

    n_rows: int
    n_bytes: int
    """Bytes of their texts, about."""
    read: Callable[[int], Iterator[Any]]
    """The column in arrays of at most so many rows."""


def row_ranges(source: Source, column: str, size: int) -> list[tuple[int, int]]:
    """The rows of a table in ranges with about `size` bytes of text.

    Raises:
        InputError: as in `texts_of`.
    """
    ranges, start, row, n_bytes = list[tuple[int, int]](), 0, 0, 0.0
    if source.format == "arrow":
        size = max(size, source.n_bytes // MOST_RANGES)
    with _opened(source, column) as groups:
        for group in groups:
            n_parts = min(max(group.n_bytes // size, group.n_rows // RANGE_ROWS, 1), group.n_rows, MOST_RANGES)
            for part in range(n_parts):
                row += group.n_rows * (part + 1) // n_parts - group.n_rows * part // n_parts
                n_bytes += group.n_bytes / n_parts
                if row > start and (n_parts > 1 or n_bytes >= size or row - start >= RANGE_ROWS):
                    ranges.append((start, row))
                    start, n_bytes = row, 0
    return [*ranges, (start, row)] if row > start else ranges


def texts_of(source: Source, column: str, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """Row number and value of the rows start:stop. A text is given as its bytes: in a damaged file, they may not be
    UTF-8.

    Raises:
        InputError: the file is damaged, or has no column with that name; or pyarrow is missing.
    """
    first = 0
    with _opened(source, column) as groups:
        for group in groups:
            if first < stop and first + group.n_rows > start:
                n_rows = min(ROWS, group.n_rows * READ_BYTES // max(group.n_bytes, 1) + 1)
                at = first
                for array in group.read(n_rows):
                    begin, end = max(start - at, 0), min(stop - at, len(array))
                    if begin < end:
                        yield from enumerate(_values(array.slice(begin, end - begin)), at + begin)
                    at += len(array)
                    if at >= stop:
                        return
            first += group.n_rows


def _values(column: Any) -> Iterator[Any]:
    arrow = importlib.import_module("pyarrow")
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        column = column.cast(arrow.large_binary())
    for value in column:
        # one after the other: an array of many texts in Python needs their memory once more
        yield value.as_py()


@contextlib.contextmanager
def _opened(source: Source, column: str) -> Iterator[Iterator[_Group]]:
    """The groups of rows of a file, in order."""
    try:
        arrow = importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise missing_package(error, "data", where=source.path) from error
    try:
        yield _parquet_groups(source, column) if source.format == "parquet" else _arrow_groups(source, column)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        hint = "get the file again"
        problem = f"damaged {source.format} file"
        raise InputError(problem, found=str(error)[:200], where=source.path, hint=hint) from error


def _check_column(source: Source, column: str, names: list[str]) -> None:
    if column not in names:
        hint = "choose one of these with --text-field"
        raise InputError(f"no column `{column}`", found=", ".join(names)[:200], where=source.path, hint=hint)


def _parquet_groups(source: Source, column: str) -> Iterator[_Group]:
    parquet = importlib.import_module("pyarrow.parquet")
    # without `pre_buffer`, and with a buffer, a column is not read at once
    options = {"page_checksum_verification": True, "pre_buffer": False, "buffer_size": READ_BYTES}
    with parquet.ParquetFile(source.path, **options) as file:
        _check_column(source, column, file.schema_arrow.names)
        for number in range(file.metadata.num_row_groups):
            stored = file.metadata.row_group(number)
            columns = map(stored.column, range(stored.num_columns))
            own = [part for part in columns if _is_of(part.path_in_schema, column)]

            def read(n_rows: int, number: int = number) -> Iterator[Any]:
                for batch in file.iter_batches(n_rows, row_groups=[number], columns=[column]):
                    yield batch.column(0)

            yield _Group(stored.num_rows, sum(part.total_uncompressed_size for part in own), read)


def _is_of(path: str, column: str) -> bool:
    """Whether a stored column is a column of the table, or a part of it: that of `messages` is stored in several."""
    return path == column or path.startswith(f"{column}.")


def _arrow_groups(source: Source, column: str) -> Iterator[_Group]:
    """One record batch at a time: those of a compressed file are in memory."""
    arrow, ipc = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.ipc")
    with arrow.memory_map(str(source.path)) as mapped:
        has_footer = mapped.read(6) == b"ARROW1"  # as in files of Feather
        mapped.seek(max(0, mapped.size() - len(STREAM_END)))
        if not has_footer and mapped.read() != STREAM_END:
            raise arrow.ArrowInvalid("the file is cut off")
        mapped.seek(0)
        reader = ipc.open_file(mapped) if has_footer else ipc.open_stream(mapped)
        _check_column(source, column, reader.schema.names)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if has_footer else reader:
            array = batch.column(column)

            def read(n_rows: int, array: Any = array) -> Iterator[Any]:
                for start in range(0, len(array), n_rows):
                    part = array.slice(start, n_rows)
                    part.validate(full=True)  # a damaged offset would lead outside of the memory
                    yield part

            yield _Group(len(array), array.nbytes, read)
