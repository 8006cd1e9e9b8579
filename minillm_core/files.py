"""Crash-safe file operations: hashes, atomic replacement, flushing to disk, locks between processes."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from minillm_core.errors import InputError
from minillm_core.progress import ignore, progress

READ_BYTES = 1 << 20
"""Bytes that are read and hashed at a time."""
LONGEST_NAME = 255
"""Bytes that file systems allow in the name of a file."""


def user_path(text: str | Path) -> Path:
    """A path as a user gives it, with `~` expanded if it is a text that begins with it (`./~x` is a name).

    Raises:
        InputError: it is empty, or no file can have such a name.
    """
    if not str(text) or "\0" in str(text):
        raise InputError("not a path", expected="the name of a file or folder", found=repr(str(text)))
    if isinstance(text, Path) or not text.startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        hint = "write the whole path, or ./~name for a name that begins with ~"
        raise InputError("no such home folder", found=repr(str(text)), hint=hint) from error


def require_writable(path: Path) -> None:
    """Checks, before long work, that a new file or folder can be made there.

    Raises:
        InputError: the nearest folder above it that exists is not a folder, or cannot be written.
    """
    place = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not place.is_dir() or not os.access(place, os.W_OK):
        found = "a file" if not place.is_dir() else "no permission to write, or a read-only disk"
        raise InputError("the output cannot be written", expected="a folder", found=found, where=place)


def as_text(name: str) -> str:
    """The name of a file or folder with a question mark for each byte that is not UTF-8, for files that must be."""
    return name.encode(errors="replace").decode()


def real_path(path: Path) -> Path:
    """The absolute path without symbolic links. (Path.resolve raises RuntimeError for a link to itself.)"""
    return Path(os.path.realpath(path))


def beside(path: Path, ending: str) -> Path:
    """The hidden path `.NAME.ending` in the folder of a file or folder, however its own path is spelt (`.`, `a/..`). In
    place of a NAME that leaves no room for the ending, its hash.

    Raises:
        InputError: the path is the root folder.
    """
    place = real_path(path)
    if not place.name:
        raise InputError("not a usable path", expected="a path below the root folder", found=path)
    name = os.fsencode(place.name)
    if len(name) + len(ending) + 2 > LONGEST_NAME:
        return place.with_name(f".{hashlib.sha256(name).hexdigest()}.{ending}")
    return place.with_name(f".{place.name}.{ending}")


def owner(path: Path) -> Path:
    """The path that a user gave, for a hidden neighbour of it (see `beside`); any other path as it is."""
    name = re.fullmatch(r"\.(.+)\.(?:lock|partial)", path.name, re.DOTALL)
    return owner(path.with_name(name[1])) if name else path


def output_file(text: str, beginning: bytes = b"") -> Path:
    """The path of a file to write, as a user gives it.

    Args:
        beginning: an existing file is replaced if its content begins so; b"": it is not replaced.

    Raises:
        InputError: it is a folder, in a folder that does not exist or cannot be written, or an existing file.
    """
    path = user_path(text)
    problem = found = None
    if text == "-":
        problem, found = "standard output is not supported here", "-"
    elif text.endswith("/") or path.is_dir():
        problem, found = "the output is a folder", "a folder"
    elif not path.absolute().parent.is_dir():
        problem, found = "the folder of the output does not exist", f"no folder {path.parent}"
    elif path.exists() and not path.is_file():
        problem, found = "the output is not a file", "a pipe or a device"
    elif path.exists() and not (beginning and first_bytes(path, len(beginning)) == beginning):
        problem, found = "the output exists already", "a file" + " of a different kind" * bool(beginning)
    elif not os.access(path.absolute().parent, os.W_OK):
        problem, found = "the output cannot be written", "no permission to write in its folder, or a read-only disk"
    if problem is not None:
        raise InputError(problem, expected="the name of a new file", found=found, where=path)
    return path


def first_bytes(path: Path, n: int) -> bytes:
    """The first n bytes of a file; empty if the path is not a file (a pipe would wait) or cannot be read."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(n)
    except OSError:
        return b""


def hash_file(path: Path, advance: Callable[[int], None] = ignore) -> str:
    """SHA-256, in hexadecimal.

    Args:
        advance: called with the number of bytes of every block that was hashed.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            advance(n)
    return digest.hexdigest()


def hash_files(paths: Sequence[Path], doing: str) -> list[str]:
    """SHA-256 of each file.

    Args:
        doing: what this is for, as the progress shows it.
    """
    with progress(doing, sum(path.stat().st_size for path in paths), "B") as work:
        return [hash_file(path, work.advance) for path in paths]


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in hexadecimal."""
    digest = hashlib.sha256()
    with progress("hashing the tensors", sum(array.nbytes for array in arrays.values()), "B") as work:
        for name, array in arrays.items():
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
            work.advance(array.nbytes)
    return digest.hexdigest()


@contextmanager
def named_if_it_fails(path: Path) -> Iterator[None]:
    """Gives an OSError in this block the name of the file that is being written. (A failed write does not know it.)"""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def replace_file(path: Path, content: bytes | str) -> None:
    """Replaces a file atomically: after a crash it has either the old or the new content, never a part."""
    path = real_path(path)  # a symbolic link stays, and what it points to is replaced
    partial = beside(path, "partial")
    try:
        with named_if_it_fails(path):
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            flush(partial)
            partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until the content of a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_folder(partial: Path, final: Path) -> None:
    """Flushes a finished folder or file to disk, with everything in it, and then gives it its final name."""
    paths = [*partial.rglob("*"), partial]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    with progress("flushing to disk", sum(sizes), "B") as work:
        for path, size in zip(paths, sizes, strict=True):
            flush(path)
            work.advance(size)
    partial.rename(final)
    flush(final.parent)


@contextmanager
def written_aside(destination: Path) -> Iterator[Path]:
    """Yields a hidden, unused path beside the destination for a file or folder. When the block ends without an error,
    what it wrote there is renamed to the destination; otherwise it is removed.

    Raises:
        InputError: the destination exists, or another process is writing it.
    """
    partial, lock_file = (beside(destination, ending) for ending in ("partial", "lock"))
    make_folder(partial.parent)
    with lock(lock_file):
        try:
            refuse_existing(destination)
            _remove(partial)  # left by a process that was killed
            yield partial
            commit_folder(partial, real_path(destination))
        finally:
            _remove(partial)
            lock_file.unlink()


def refuse_existing(destination: Path) -> None:
    """Raises InputError if a path already exists."""
    if destination.exists():
        raise InputError("the destination exists", where=destination, hint="give a different name, or remove it")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Creates a folder and its parents, and flushes their names to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        is_file = next((folder for folder in (path, *path.parents) if folder.exists() and not folder.is_dir()), path)
        raise InputError("not a folder", expected="a folder", found="a file", where=is_file) from error
    for folder in missing:
        flush(folder.parent)


def remove_folder(path: Path) -> None:
    """Renames a folder to a hidden name and removes it, so that a crash half-way leaves nothing that looks complete."""
    doomed = beside(path, "partial")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that no space is left. Some libraries keep only the message of the system's error."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(os.strerror(number) in str(error) for number in numbers)


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file. The system frees the lock when the process ends, even by a crash.

    Args:
        wait: wait until the lock is free, instead of raising.

    Raises:
        InputError: a different process holds the lock; the message names it.
    """
    with path.open("a+", encoding="utf-8", errors="backslashreplace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                "another process is working here",
                found=file.read().strip() or None,
                where=path.parent,
                hint="wait for it to end, or use a different path",
            ) from None
        with named_if_it_fails(path):
            file.truncate(0)
            file.write(f"process {os.getpid()}: {' '.join(sys.argv)}\n")
            file.flush()
        yield
