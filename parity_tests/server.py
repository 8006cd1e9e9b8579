"""A real server process for tests: a model of random weights with a chat template, served by both frameworks."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from minillm_core.config import ModelConfig
from minillm_core.interop.hf import write_hf_weights
from minillm_core.interop.hf_config import to_hf_config
from minillm_core.interop.imports import import_checkpoint
from parity_tests.commands import environment
from parity_tests.conftest import BACKENDS, ROOT, TINY, random_weights
from parity_tests.test_chat_template import byte_level

CONFIG = replace(TINY, vocab_size=608, context_length=320)


def make_run(folder: Path, corpus: Path, config: ModelConfig = CONFIG, template: str | None = None) -> Path:
    """A run with a checkpoint of PyTorch; `folder / "hf"` is the same model for transformers.

    Args:
        template: the chat template; None for SmolLM2's.
    """
    texts = [path.read_text(encoding="utf-8")[:4000] for path in sorted(corpus.glob("*.txt"))[:5]]
    byte_level(folder / "hf", "chatml", texts)
    if template is not None:
        (folder / "hf" / "chat_template.jinja").write_text(template)
    (folder / "hf" / "config.json").write_text(json.dumps(to_hf_config(config, "float32")))
    write_hf_weights(folder / "hf", config, random_weights(config), "float32")
    import_checkpoint("hf", folder / "hf", folder / "tiny", BACKENDS["torch"])
    return folder / "tiny"


class Server:
    """`minillm serve` in a process of its own."""

    def __init__(self, run: Path, *options: str, **variables: str):
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(run), "--port", "0", *options]
        descriptor, name = tempfile.mkstemp(prefix="server-", suffix=".log")
        self.log = Path(name)
        self.process = subprocess.Popen(command, stderr=descriptor, env=environment() | variables)
        os.close(descriptor)
        while not (found := re.search(r"serving .* on (http://\S+)", self.log.read_text(encoding="utf-8"))):
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            time.sleep(0.1)
        self.url = found[1]
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def wait(self) -> None:
        """Until the models are loaded."""
        give_up = time.monotonic() + 120
        while self.client.get("/health").status_code == 503:
            assert time.monotonic() < give_up
            time.sleep(0.1)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        defaults = {} if path.startswith("/playground") else {"model": "tiny-torch"}
        return self.client.post(path, json=defaults | body)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))

    def memory(self) -> int:
        """Bytes of resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(status.split("VmRSS:")[1].split()[0]) << 10


@contextlib.contextmanager
def serving(run: Path, *options: str, **variables: str) -> Iterator[Server]:
    server = Server(run, *options, **variables)
    try:
        server.wait()
        yield server
    finally:
        server.client.close()
        server.process.terminate()
        server.process.wait(timeout=30)
        server.log.unlink()
