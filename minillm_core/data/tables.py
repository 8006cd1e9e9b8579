"""Texts in a column of a table: a parquet or an Arrow file. (The package `datasets` keeps its data in Arrow files.)"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from minillm_core.data.sources import Source
from minillm_core.errors import InputError, missing_package

ROWS = 1000
"""Rows that are read at a time, at most."""
READ_BYTES = 1 << 22
"""Texts that are read at a time, about."""
MOST_PARTS = 16
"""Ranges of rows that are stored together, at most. To read a range, what is before it must be read too."""


def is_table(source: Source) -> bool:
    return source.format in ("parquet", "arrow")


@dataclass(frozen=True)
class _Group:
    """Rows that are stored together."""

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
    with _opened(source, column) as groups:
        for group in groups:
            n_parts = min(max(group.n_bytes // size, 1), group.n_rows, MOST_PARTS)
            for part in range(n_parts):
                row += group.n_rows * (part + 1) // n_parts - group.n_rows * part // n_parts
                n_bytes += group.n_bytes / n_parts
                if row > start and (n_parts > 1 or n_bytes >= size):
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
def _opened(source: Source, column: str) -> Iterator[list[_Group]]:
    """The groups of rows of a file."""
    try:
        arrow = importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise missing_package(error, "data", where=source.path) from error
    try:
        if source.format == "parquet":
            # without `pre_buffer`, and with a buffer, a column is not read at once
            with importlib.import_module("pyarrow.parquet").ParquetFile(
                source.path, page_checksum_verification=True, pre_buffer=False, buffer_size=READ_BYTES
            ) as file:
                _check_column(source, column, file.schema_arrow.names)
                yield [_parquet_group(file, column, number) for number in range(file.metadata.num_row_groups)]
        else:
            ipc = importlib.import_module("pyarrow.ipc")
            with arrow.memory_map(str(source.path)) as mapped:
                has_footer = mapped.read(6) == b"ARROW1"  # as in files of Feather
                mapped.seek(0)
                reader = ipc.open_file(mapped) if has_footer else ipc.open_stream(mapped)
                _check_column(source, column, reader.schema.names)
                batches = map(reader.get_batch, range(reader.num_record_batches)) if has_footer else reader
                yield [_arrow_group(batch.column(column)) for batch in batches]
    except (arrow.ArrowException, OSError) as error:
        hint = "get the file again"
        problem = f"damaged {source.format} file"
        raise InputError(problem, found=str(error)[:200], where=source.path, hint=hint) from error


def _check_column(source: Source, column: str, names: list[str]) -> None:
    if column not in names:
        hint = "choose one of these with --text-field"
        raise InputError(f"no column `{column}`", found=", ".join(names)[:200], where=source.path, hint=hint)


def _parquet_group(file: Any, column: str, number: int) -> _Group:
    stored = file.metadata.row_group(number)
    own = [stored.column(i) for i in range(stored.num_columns) if stored.column(i).path_in_schema == column]

    def read(n_rows: int) -> Iterator[Any]:
        for batch in file.iter_batches(n_rows, row_groups=[number], columns=[column]):
            yield batch.column(0)

    return _Group(stored.num_rows, sum(part.total_uncompressed_size for part in own), read)


def _arrow_group(array: Any) -> _Group:
    def read(n_rows: int) -> Iterator[Any]:
        for start in range(0, len(array), n_rows):
            yield array.slice(start, n_rows)

    return _Group(len(array), array.nbytes, read)
