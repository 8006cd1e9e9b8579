"""The examples of docs/serving.md run against a server, and its tables have every field and status."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm_core.serving.schemas import ChatRequest, CompletionRequest, SamplingFields
from parity_tests.commands import environment
from parity_tests.conftest import ROOT
from parity_tests.server import Server, make_run, serving

pytestmark = pytest.mark.extended

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return [block for block in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if ADDRESS in block]


def fields(heading: str) -> set[str]:
    """The fields in the first column of the table under a heading."""
    section = PAGE.split(f"### {heading}\n")[1].split("\n#")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Server]:
    run = make_run(tmp_path_factory.mktemp("serve"), corpus)
    with serving(run, "--backend", "torch", "--name", "quickstart", "--max-batch", "1") as found:
        yield found


def test_curl(server: Server) -> None:
    command = next(block for block in blocks("bash") if block.startswith("curl"))
    done = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, server.url)], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["text"]


def test_client(server: Server) -> None:
    """The stream prints the text of the whole answer."""
    (code,) = blocks("python")
    command = [sys.executable, "-c", code.replace(ADDRESS, server.url)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    text = done.stdout.partition(" CompletionUsage")[0]
    assert done.stdout.count(text) == 2, done.stdout


def test_tables() -> None:
    common = SamplingFields.model_fields.keys()
    assert fields("Fields of both kinds of completions") == {*common}
    assert fields("Fields of `/v1/completions`") == CompletionRequest.model_fields.keys() - common
    assert fields("Fields of `/v1/chat/completions`") == ChatRequest.model_fields.keys() - common
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "minillm_core" / "serving").glob("*.py"))
    section = PAGE.split("## Limits and errors\n")[1].split("\n#")[0]
    statuses = {*re.findall(r"ApiError\((\d{3})", source), "404", "405"}
    assert {*re.findall(r"^\| (\d{3}) \|", section, re.MULTILINE)} == statuses
    for code in re.findall(r'code="(\w+)"', source):
        assert f"`{code}`" in section
