"""The process of one engine: `python -m minillm_cli.benchmark.worker ENGINE WORK`.

It reads one JSON object per line on stdin and answers each with one on stdout. Everything else that the libraries print
goes to stderr.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the engines share a GPU; read at import

import gc
import json
import platform
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minillm_cli.benchmark import bounds
from minillm_cli.benchmark.cases import Case
from minillm_cli.benchmark.engines import Round, framework_of, import_framework, make_round
from minillm_core.errors import InputError

PACKAGES = {
    "jax": ("jax", "jaxlib", "flax"),
    "torch": ("torch",),
    "torch-compiled": ("torch",),
    "transformers": ("transformers", "torch"),
    "llama.cpp": ("cyllama",),
}


class Server:
    """Answers requests about one engine."""

    def __init__(self, engine: str, work: str):
        self.engine = engine
        self.framework = import_framework(engine, work)
        self.rounds: list[Round] = []

    def hello(self) -> dict[str, Any]:
        """The device and the versions."""
        kind = framework_of(self.engine)
        name, on_gpu = _processor(), False
        if kind == "jax":
            device = self.framework.devices()[0]
            on_gpu = device.platform == "gpu"
            name = device.device_kind if on_gpu else name
        elif kind == "torch" and self.framework.cuda.is_available():
            name, on_gpu = self.framework.cuda.get_device_name(), True
        return {"device": name, "gpu": on_gpu, "versions": {name: version(name) for name in PACKAGES[self.engine]}}

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        """Builds a model, compiles and warms up."""
        started = time.perf_counter()
        self.rounds.append(make_round(self.engine, Case.from_json(case)))
        for _ in range(2):
            self.rounds[-1]()
        return {"seconds": time.perf_counter() - started}

    def run(self, which: int = 0) -> dict[str, Any]:
        """One round of a case, by the order in which they were prepared."""
        started = time.perf_counter()
        loss = self.rounds[which]()
        return {"seconds": time.perf_counter() - started, "loss": loss}

    def peak(self) -> dict[str, Any]:
        """The largest memory so far: of the framework on a GPU, else of this process."""
        kind = framework_of(self.engine)
        if kind == "jax" and self.framework.default_backend() == "gpu":
            return {"bytes": self.framework.devices()[0].memory_stats()["peak_bytes_in_use"]}
        if kind == "torch" and self.framework.cuda.is_available():
            return {"bytes": self.framework.cuda.max_memory_allocated()}
        status = Path("/proc/self/status").read_text(encoding="utf-8")  # not getrusage: it includes the parent's memory
        return {"bytes": 1024 * int(status.split("VmHWM:")[1].split()[0])}

    def forget(self) -> dict[str, Any]:
        """Frees the models of all cases."""
        self.rounds.clear()
        gc.collect()
        return {}

    def bounds(self, dtype: str) -> dict[str, Any]:
        """Frees the models and measures the bounds."""
        self.forget()
        return dict(bounds.measure(framework_of(self.engine) or "torch", dtype))


def _processor() -> str:
    """The name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            server = server or Server(*sys.argv[1:3])
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # told to the parent, which measures the other engines
            traceback.print_exc()
            answer = {"failed": str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
