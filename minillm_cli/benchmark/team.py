"""The processes of several engines. They take turns, so that a slow moment of the machine affects all of them."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import minillm_cli
from minillm_cli.benchmark.engines import OURS
from minillm_cli.process import malloc_settings


class EngineError(Exception):
    """An engine failed at a work; the others can go on."""

    def __init__(self, engine: str, problem: str):
        super().__init__(problem)
        self.engine = engine


class Engine:
    """One process. It waits, without using the processor, until it is asked."""

    def __init__(self, name: str, work: str):
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        here = str(Path(minillm_cli.__file__).parent.parent)
        settings = malloc_settings() if name in OURS and work == "train" else {}  # peers keep their own
        paths = [path for path in (os.environ.get("PYTHONPATH"), here) if path]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "minillm_cli.benchmark.worker", name, work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env=os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self.pid = self._process.pid

    def send(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says that the process has ended
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Raises EngineError if the request failed or the process ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise EngineError(self.name, f"its process ended with status {self._process.wait()}\n{self.log()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise EngineError(self.name, answer["failed"])
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.send(do, **arguments)
        return self.receive()

    def log(self, n_lines: int = 12) -> str:
        """The last lines that the process printed."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-n_lines:])

    def close(self) -> None:
        """Ends the process: by the end of its input, so that it ends its own children; else by force."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


@contextmanager
def team(names: Sequence[str], work: str) -> Iterator[dict[str, Engine]]:
    """Starts engines for one work, and ends them. A process for each work, so that its peak memory is that work's."""
    engines = {name: Engine(name, work) for name in names}
    try:
        yield engines
    finally:
        for engine in engines.values():
            engine.close()
