"""How tests run the commands of scripts/: in a process of their own, or in this one, which is faster."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parity_tests.conftest import ROOT


def script(name: str, *arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    how: dict[str, Any] = {"capture_output": True, "text": True, "env": environment(), "timeout": 300, "check": False}
    return subprocess.run(command, cwd=cwd, input=stdin, **how)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def succeeds(name: str, *arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = script(name, *arguments, cwd=cwd, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done


def succeeds_here(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = script_here(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def script_here(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script that runs in this process, which spares the start of an interpreter and the imports."""
    path = str(ROOT / "scripts" / f"{name}.py")
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [path, *arguments])
        patch.setenv("COLUMNS", "200")
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as ended:
            status = int(str(ended.code))
    return subprocess.CompletedProcess([path, *arguments], status, out.getvalue(), err.getvalue())


def sampled(done: subprocess.CompletedProcess[str]) -> str:
    """The prompt that a training command says it continued, after a check that it did."""
    advice = next(line for line in done.stderr.splitlines() if " --prompt " in line)
    prompt = shlex.split(advice)[-1]
    assert re.match(re.escape(prompt) + r"\S* *\S", done.stdout), "the prompt and its continuation"
    return prompt


def fails(message: str, name: str, *arguments: str, cwd: Path) -> str:
    """Bad input: exit status 2, a message that matches, no traceback, nothing on stdout. (In this process;
    test_package.py has real ones.)"""
    done = script_here(name, *arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert re.search(message, done.stderr, re.DOTALL), done.stderr
    return done.stderr
