"""The inputs of a preparation: files, folders and patterns, as a list of files whose format is known."""

import contextlib
import glob
import gzip
import hashlib
import importlib
import io
import logging
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from minillm_core.errors import InputError, missing_package
from minillm_core.files import user_path

logger = logging.getLogger(__name__)

Format = Literal["text", "jsonl", "parquet"]
Compression = Literal["", "gz", "xz", "zst"]

FORMATS: dict[str, Format] = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
"""Ending of a file -> its format. A file that is named itself, with a different ending, is text."""

END_BYTES = 1 << 16

ENDINGS = "files that end in .txt, .md, .jsonl or .parquet; also with .gz, .xz or .zst"


@dataclass(frozen=True)
class Source:
    """Bytes start:stop of one input file."""

    path: Path
    format: Format
    compression: Compression = ""
    start: int = 0
    stop: int = -1
    """-1: the end of the file."""
    split: str | None = None
    """The split of all its documents; None: a rule decides for each document."""

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
    if format is None or (format == "parquet" and compression):
        return None
    return Source(path, format, cast(Compression, compression))


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The files of all inputs, in their order; those of one folder or pattern in the order of their paths.

    Args:
        inputs: files, folders (with their subfolders) and patterns such as `books/*.txt`.

    Raises:
        InputError: an input does not exist, has no file that can be read, or gives a file that was given before.
    """
    sources: list[Source] = []
    for given in inputs:
        path = user_path(given)
        if path.is_dir():
            found = _in_folder(path)
        elif path.is_file():
            found = [source_of(path) or Source(path, "text")]
        elif path.exists():
            raise InputError("the input is neither a file nor a folder", where=path, hint="give a file or a folder")
        else:
            found = _matching(str(path))
        if not found:
            raise InputError("nothing to read in this input", expected=ENDINGS, where=path, hint="check the path")
        sources += found
    seen: dict[str, Path] = {}
    for source in sources:
        real = os.path.realpath(source.path)
        if real in seen:
            found_twice, hint = f"{seen[real]} and {source.path}", "give each file once"
            raise InputError("an input file is given twice", found=found_twice, where=real, hint=hint)
        seen[real] = source.path
    return sources


def _matching(pattern: str) -> list[Source]:
    if not re.search(r"[*?\[]", pattern):
        raise InputError(
            "the input does not exist", expected="a file, a folder or a pattern", where=pattern, hint="check the path"
        )
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    sources = {path: source_of(path) for path in paths if path.is_file()}
    _say_left_out(pattern, [path for path in paths if sources.get(path) is None])
    return [source for source in sources.values() if source is not None]


def _say_left_out(place: object, paths: Sequence[Path]) -> None:
    if paths:
        example = min(paths)
        logger.warning(f"left out {len(paths)} path(s) of {place} that are not {ENDINGS}; for example {example}")


def walk_folder(folder: Path) -> Iterator[Path]:
    """Every entry in a folder and its subfolders that is not a folder, also behind symbolic links; each folder once."""

    def unreadable(error: OSError) -> None:
        raise error

    seen = set()
    for place, subfolders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()  # of two links to one folder, always the same one is taken
        yield from (Path(place) / name for name in sorted(names))


def _in_folder(folder: Path) -> list[Source]:
    """
    Raises:
        InputError: something with the name of an input is not a file, or a link leads nowhere.
    """
    found, others = [], []
    for path in walk_folder(folder):
        source = source_of(path)
        if source is None:
            others += [path] * (not path.name.startswith("."))
        elif path.is_file():
            found.append(source)
        else:
            raise not_a_file(path)
    _say_left_out(folder, others)
    return sorted(found, key=lambda source: source.path)


def not_a_file(path: Path) -> InputError:
    hint = "remove it from the folder, or replace it by a file"
    return InputError(
        "not a text file", expected="a file", found="a pipe, a device or a broken link", where=path, hint=hint
    )
