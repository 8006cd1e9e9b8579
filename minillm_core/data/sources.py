"""Files of text whose format is known, and their uncompressed bytes."""

import contextlib
import gzip
import hashlib
import importlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from minillm_core.errors import InputError, missing_package

FileFormat = Literal["text", "jsonl", "parquet", "arrow"]
Compression = Literal["", "gz", "xz", "zst"]

FORMATS: dict[str, FileFormat] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Ending of a file -> its format. A file that is named itself, with a different ending, is text."""

END_BYTES = 1 << 16


@dataclass(frozen=True)
class Source:
    """Bytes start:stop of one input file."""

    path: Path
    format: FileFormat
    compression: Compression = ""
    start: int = 0
    stop: int = -1
    """-1: the end of the file."""
    split: str | None = None
    """The split of all its documents; None: a rule decides for each document."""
    origin: str = ""
    """Where a downloaded file is from."""

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return (self.path.stat().st_size if self.stop < 0 else self.stop) - self.start

    def stamp(self) -> tuple[int, int, int]:
        """What the system says about the file: if it is the same after reading as before, the file did not change."""
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def ends_hash(self) -> str:
        """A hash of the beginning and the end of the file: it tells two files of the same size apart."""
        with self.path.open("rb") as file:
            digest = hashlib.blake2b(file.read(END_BYTES), digest_size=16)
            file.seek(max(0, os.fstat(file.fileno()).st_size - END_BYTES))
            digest.update(file.read(END_BYTES))
        return digest.hexdigest()

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """The uncompressed bytes, and the file on disk from which they are read.

        Raises:
            InputError: the file is damaged, or the package for its compression is missing.
        """
        with self.path.open("rb") as file, self._damage_named():
            if self.compression == "gz":
                with gzip.GzipFile(fileobj=file) as stream:
                    yield cast(BinaryIO, stream), file
            elif self.compression == "xz":
                with lzma.LZMAFile(file) as stream:
                    yield cast(BinaryIO, stream), file
            elif self.compression == "zst":
                with io.BufferedReader(_Zstandard(file, self.path)) as stream:
                    yield cast(BinaryIO, stream), file
            else:
                yield file, file

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            hint = "get the file again"
            raise InputError("damaged compressed file", found=error, where=self.path, hint=hint) from error


class _Zstandard(io.RawIOBase):
    """Uncompressed Zstandard. (The package's own stream takes a truncated file for a whole one.)"""

    def __init__(self, file: BinaryIO, path: Path):
        try:
            self._package = importlib.import_module("zstandard")
        except ModuleNotFoundError as error:
            raise missing_package(error, "data", where=path) from error
        self._file, self._data = file, b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data:
            block = self._file.read(1 << 17)
            if not block:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            found = []
            while block:
                if self._frame is None:
                    self._frame = self._package.ZstdDecompressor().decompressobj()
                try:
                    found.append(self._frame.decompress(block))
                except self._package.ZstdError as error:
                    raise EOFError(str(error)) from error
                block = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
            self._data = b"".join(found)
        n = min(len(buffer), len(self._data))
        buffer[:n], self._data = self._data[:n], self._data[n:]
        return n


def source_of(path: Path) -> Source | None:
    """A file as a source, by its ending; None if the ending is not one of those that are read."""
    name = path.name.lower()
    compression = next((ending for ending in ("gz", "xz", "zst") if name.endswith(f".{ending}")), "")
    name = name.removesuffix(f".{compression}") if compression else name
    format = FORMATS.get(os.path.splitext(name)[1])
    if format is None or (format in ("parquet", "arrow") and compression):
        return None
    return Source(path, format, cast(Compression, compression))
