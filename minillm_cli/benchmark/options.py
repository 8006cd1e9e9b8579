"""The options of `minillm benchmark`: their meaning, their checks, and the cases that they ask for."""

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from minillm_cli.benchmark.cases import WORKS, Case, train_case
from minillm_cli.benchmark.engines import DOES, OURS, PEERS
from minillm_core.config import RunConfig
from minillm_core.errors import InputError, missing_package

NEEDS: dict[str, list[tuple[str, str | None]]] = {
    "jax": [("jax", None)],
    "torch": [("torch", "torch")],
    "torch-compiled": [("torch", "torch")],
    "transformers": [("torch", "torch"), ("transformers", "transformers")],
    "llama.cpp": [("cyllama", "test"), ("gguf", "gguf")],
}
"""Engine -> its packages, and the extra that installs each."""


@dataclass(frozen=True)
class Options:
    """Measures training, prompt processing and decoding, next to other libraries and to what this machine can do.

    Weights and tokens are random, so it needs no data. Every engine runs in its own process, and the engines take
    turns. Compilation is not in the times.
    """

    preset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[PRESET|FILE.yaml]")]] = "mini-llm-50m"
    """The model's shape and the settings of the optimizer."""
    works: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[train|prefill|decode ...]")] = WORKS
    """What to measure: train (a step: forward, backward, clipping, AdamW), prefill (a prompt into a cache), decode
    (greedy, the whole call)."""
    engines: Annotated[tuple[str, ...], tyro.conf.arg(metavar="jax|torch|torch-compiled ...")] = ("jax", "torch")
    """Engines of this project. torch-compiled decodes with torch.compile, and does nothing else."""
    peers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="transformers|llama.cpp ...")] = ()
    """Other libraries to compare with. llama.cpp does not train."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products and activations, and of the weights unless they are trained. auto means bfloat16 on a GPU, else
    float32."""
    rows: int | None = None
    """Sequences of a training step (default: 2, on a GPU 64)."""
    seq_len: int | None = None
    """Tokens of a sequence of training, and of the prompt of prefill (default: 512, or what the context allows)."""
    grad_accum: int = 1
    """Micro-batches of a training step."""
    steps: int | None = None
    """Training steps per round (default: 2, on a GPU 10)."""
    decode_rows: tuple[int, ...] = (1, 16)
    """How many prompts are continued together."""
    tokens: int = 128
    """New tokens of every row."""
    prompt: int = 32
    """Tokens of a prompt. Several prompts have lengths from a quarter to the double of it."""
    rounds: int = 5
    """How often each engine is timed."""
    scaling: bool = False
    """Also measure how cost grows with length, batch, depth, width and context, on small models (three minutes)."""
    out: str | None = None
    """A folder for report.md, results.json and the pictures. The results of an earlier benchmark there are replaced."""
    against: str | None = None
    """The results.json of an earlier run on this machine. If a share of the bound or a ratio to a peer has fallen, the
    command ends with exit status 2."""
    tolerance: float = 0.1
    """How much of its earlier value such a number may lose."""

    def check(self, context: int) -> None:
        """Raises InputError for options that are wrong on every machine."""
        for kind, given, known in (
            ("work", self.works, WORKS),
            ("engine", self.engines, OURS),
            ("peer", self.peers, PEERS),
        ):
            _check_names(kind, given, known)
        if not self.engines or not (self.works or self.scaling):
            found = "no engine" if not self.engines else "no work"
            raise InputError("nothing to measure", expected="one or more engines, and works or --scaling", found=found)
        for work in self.works:
            if not any(work in DOES[name] for name in self.engines):
                able = ", ".join(name for name in OURS if work in DOES[name])
                found = ", ".join(self.engines)
                raise InputError(f"no engine for the work {work}", expected=f"one or more of {able}", found=found)
        counts = {"rows": self.rows, "seq-len": self.seq_len, "grad-accum": self.grad_accum, "steps": self.steps}
        counts |= {"tokens": self.tokens, "prompt": self.prompt, "rounds": self.rounds}
        counts |= {"decode-rows": min(self.decode_rows, default=0)}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"--{name} is out of range", expected="1 or more", found=value)
        if self.seq_len is not None and self.seq_len > context:
            expected = f"at most {context}, the context of {self.preset}"
            raise InputError("--seq-len is out of range", expected=expected, found=self.seq_len)
        if not 0 <= self.tolerance < 1:
            raise InputError("--tolerance is out of range", expected="0 <= tolerance < 1", found=self.tolerance)
        for name in (*self.engines, *self.peers):
            for package, extra in NEEDS[name]:
                if importlib.util.find_spec(package) is None:
                    error = ModuleNotFoundError(f"No module named {package!r}", name=package)
                    raise missing_package(error, extra, where=f"the engine {name}")

    def cases(self, config: RunConfig, *, on_gpu: bool) -> list[Case]:
        """Raises InputError if a size does not fit the model."""
        dtype = self.resolved_dtype(on_gpu=on_gpu)
        context = config.model.context_length
        length = min(512, context) if self.seq_len is None else self.seq_len
        found: list[Case] = []
        if "train" in self.works:
            rows, steps = self.rows or (64 if on_gpu else 2), self.steps or (10 if on_gpu else 2)
            found.append(train_case(config, dtype, rows, length, self.grad_accum, steps))
        if "prefill" in self.works:
            found.append(Case("prefill", config, dtype, 1, min(length, context - 2)))
        if "decode" in self.works:
            for rows in dict.fromkeys(self.decode_rows):
                found.append(Case("decode", config, dtype, rows, self.prompt, self.tokens))
                _check_fits(found[-1], context)
        return found

    def resolved_dtype(self, *, on_gpu: bool) -> Literal["float32", "bfloat16"]:
        if self.dtype == "auto":
            return "bfloat16" if on_gpu else "float32"
        return self.dtype

    @property
    def references(self) -> tuple[str, ...]:
        """What the engines are compared with: the peers; without one, torch."""
        return self.peers or (("torch",) if "torch" in self.engines else self.engines[:1])


def _check_names(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else None
            raise InputError(f"unknown {kind}", expected=", ".join(known), found=repr(name), hint=hint)
    if len(set(given)) < len(given):
        raise InputError(f"the same {kind} is given twice", found=" ".join(given), hint="give it once")


def _check_fits(case: Case, context: int) -> None:
    longest = max(case.lengths())
    if longest + case.repeats > context:
        found = f"{longest} tokens + {case.repeats} new ones"
        hint = "lower --prompt or --tokens (several prompts have up to twice the length of --prompt)"
        raise InputError("a text is longer than the context", expected=f"at most {context}", found=found, hint=hint)
