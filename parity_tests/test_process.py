"""The settings that a command gives its process before it imports a framework."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def run(tmp_path: Path, **env: str) -> tuple[int, list[str]]:
    (tmp_path / "program.py").write_text(PROGRAM)
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "utf8", str(tmp_path / "program.py"), "an argument", ""]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | env
    )
    out, _ = process.communicate()
    assert process.returncode == 0
    return process.pid, out.splitlines()


@pytest.mark.skipif(not malloc_settings() and "GLIBC_TUNABLES" not in os.environ, reason="no glibc, or an old one")
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


def environment_of(pid: int) -> str:
    """The environment of a process that is just starting."""
    for _ in range(1000):
        if "PYTHONPATH=" in (found := Path(f"/proc/{pid}/environ").read_bytes().decode()):
            return found
        time.sleep(0.01)
    raise AssertionError("it has no environment")


def test_a_benchmark_has_the_settings_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training of this project's engines; decoding and other libraries keep their own."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for work, name in (("train", "jax"), ("train", "transformers"), ("decode", "jax")):
        with team([name], work) as engines:
            environ = environment_of(engines[name].pid)
        is_set = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in environ
        assert is_set == ((work, name) == ("train", "jax") and malloc_settings() != {})


@pytest.mark.parametrize("version", ["glibc 2.34", "musl 1.2", "", None])
def test_other_c_libraries_are_left_alone(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "confstr", lambda name: version)
    assert malloc_settings() == {}
