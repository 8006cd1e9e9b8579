"""The settings that a command gives its process before it imports a framework."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import minillm_cli.main
from minillm_cli import process
from minillm_cli.benchmark.team import team
from minillm_cli.process import malloc_settings

PROGRAM = """
import os, resource, sys
print(os.getpid(), *sys.argv[1:], flush=True)
from minillm_cli.process import set_malloc
set_malloc()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    block = libc.malloc(100_000_000)
    ctypes.memset(block, 1, 100_000_000)
    libc.free(block)
print(os.environ.get("GLIBC_TUNABLES"), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Allocates, fills and frees 100 MB ten times: 24,400 pages of 4 kB each time."""


LIBRARY, VERSION = platform.libc_ver()
HAS_SETTINGS = LIBRARY == "glibc" and tuple(map(int, VERSION.split("."))) >= (2, 35)
needs_glibc = pytest.mark.skipif(not HAS_SETTINGS, reason="no glibc, or an old one")


def run(tmp_path: Path, **env: str) -> tuple[int, list[str]]:
    (tmp_path / "program.py").write_text(PROGRAM)
    inherited = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", process.RESTARTED)}
    command = [sys.executable, "-X", "utf8", str(tmp_path / "program.py"), "an argument", ""]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | env
    )
    out, _ = child.communicate()
    assert child.returncode == 0
    return child.pid, out.splitlines()


@needs_glibc
def test_a_process_restarts_itself_once_and_keeps_its_memory(tmp_path: Path) -> None:
    """The same process with the same arguments. Measured: 244,000 page faults without the settings, 200 with."""
    pid, (first, second, last) = run(tmp_path)
    assert first == second == f"{pid} an argument "
    settings, faults = last.split()
    assert "glibc.malloc.hugetlb=1" in settings
    assert int(faults) <= 50_000


def test_the_settings_of_the_user_stay(tmp_path: Path) -> None:
    _, (_, last) = run(tmp_path, GLIBC_TUNABLES="glibc.malloc.check=0")
    assert last.startswith("glibc.malloc.check=0 ")


def test_a_program_that_calls_a_command_is_not_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test or a notebook would be lost. A command whose restart is impossible, or was in vain, goes on."""
    restarts: list[list[str]] = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        restarts.append(arguments)
        raise OSError("too many arguments")

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execve", execve)
    for orig_argv, restarted, expected in (
        (["python", "-m", "pytest"], False, 0),
        (["python", "minillm", "train", "--help"], False, 1),
        (["python", "minillm", "train", "--help"], True, 0),
    ):
        monkeypatch.setattr(sys, "argv", ["minillm", "train", "--help"])
        monkeypatch.setattr(sys, "orig_argv", orig_argv)
        with monkeypatch.context() as patch:
            if restarted:
                patch.setenv(process.RESTARTED, "1")
            restarts.clear()
            with pytest.raises(SystemExit) as end:
                minillm_cli.main._dispatch()
        assert end.value.code == 0
        assert len(restarts) == expected * HAS_SETTINGS


def environment_of(pid: int) -> str:
    """The environment of a process that is just starting."""
    for _ in range(1000):
        if "PYTHONPATH=" in (found := Path(f"/proc/{pid}/environ").read_bytes().decode()):
            return found
        time.sleep(0.01)
    raise AssertionError("it has no environment")


@needs_glibc
def test_a_benchmark_has_the_settings_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training of this project's engines; decoding and other libraries keep their own."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for work, name in (("train", "jax"), ("train", "transformers"), ("decode", "jax")):
        with team([name], work) as engines:
            environ = environment_of(engines[name].pid)
        is_set = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in environ
        assert is_set == ((work, name) == ("train", "jax"))


def fails_with(error: Exception) -> Any:
    def confstr(name: str) -> str:
        raise error

    return confstr


@pytest.mark.parametrize(
    "confstr",
    [
        lambda name: "glibc 2.34",
        lambda name: "",
        lambda name: None,
        fails_with(OSError("Invalid argument")),  # musl
        fails_with(ValueError("unrecognized configuration name")),  # macOS
        fails_with(AttributeError("confstr")),  # Windows
    ],
)
def test_other_c_libraries_are_left_alone(confstr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "confstr", confstr)
    assert malloc_settings() == {}
