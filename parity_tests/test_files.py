"""Crash-safe file operations: what reaches the disk and in which order, what is left behind, and what a hash covers."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from minillm_core.errors import InputError
from minillm_core.files import (
    hash_arrays,
    is_disk_full,
    lock,
    make_folder,
    named_if_it_fails,
    replace_file,
    written_aside,
)

pytestmark = pytest.mark.extended


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every flush and rename, by the path within tmp_path."""
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def within(path: str) -> str:
        return os.path.relpath(path, tmp_path)

    def watched_fsync(descriptor: int) -> None:
        seen.append(f"flush {within(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        seen.append(f"rename {within(str(self))} to {within(str(target))}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    return seen


def test_a_replaced_file_is_flushed_first(events: list[str], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    replace_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new"
    assert events == ["flush .x.partial", "rename .x.partial to x", "flush ."]


def test_new_folders_are_flushed(events: list[str], tmp_path: Path) -> None:
    """The name of each new folder is on disk when `make_folder` returns."""
    make_folder(tmp_path / "a/b")
    assert sorted(events) == ["flush .", "flush a"]
    make_folder(tmp_path / "a/b")
    assert len(events) == 2


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_leftovers_of_a_killed_process_are_replaced(is_folder: bool, tmp_path: Path) -> None:
    left = tmp_path / ".result.partial"
    if is_folder:
        left.mkdir()
        (left / "old").write_text("half")
    else:
        left.write_text("half of a longer text")
    with written_aside(tmp_path / "result") as beside:
        assert not beside.exists()
        beside.write_text("whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"result": "whole"}


def test_a_lock_names_its_holder_only(tmp_path: Path) -> None:
    """Not the processes that held it before."""
    (tmp_path / ".lock").write_text("process 1: the one before, with a long command line")
    with lock(tmp_path / ".lock"):
        with pytest.raises(InputError, match=rf"found: process {os.getpid()}: ") as refused, lock(tmp_path / ".lock"):
            pass
        assert "the one before" not in str(refused.value)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        *((OSError(number, os.strerror(number)), True) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        (RuntimeError("write failed: No space left on device"), True),
        (RuntimeError("Disk quota exceeded"), True),
        (OSError(errno.EIO, os.strerror(errno.EIO)), False),
        (RuntimeError("no"), False),
    ],
    ids=str,
)
def test_a_full_disk_is_recognised(error: BaseException, full: bool) -> None:
    assert is_disk_full(error) == full


def test_a_hash_of_arrays_covers_everything() -> None:
    """Names, dtypes, shapes, values, and the order of the arrays."""
    array = np.arange(6, dtype=np.float32)
    variants = [
        {"a": array, "b": array[:2]},
        {"b": array[:2], "a": array},
        {"a": array, "c": array[:2]},
        {"a": array.reshape(2, 3), "b": array[:2]},
        {"a": array.view(np.int32), "b": array[:2]},
        {"a": array + 1, "b": array[:2]},
    ]
    assert len({hash_arrays(arrays) for arrays in variants}) == len(variants)
    assert hash_arrays({"a": np.repeat(array, 2)[::2]}) == hash_arrays({"a": array})


def test_a_failed_write_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's error of a write has no name. The old content stays, and no part of the new."""
    (tmp_path / "file").write_text("old", encoding="utf-8")

    def full(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as error:
        replace_file(tmp_path / "file", "new")
    assert error.value.filename == str(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OSError, match="No space left") as error, named_if_it_fails(tmp_path / "log"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.filename == str(tmp_path / "log")
