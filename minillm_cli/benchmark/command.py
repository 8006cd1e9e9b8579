"""`minillm benchmark`: the arguments, and what is measured by default."""

import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minillm_cli.benchmark.cases import WORKS, Case, train_case
from minillm_cli.benchmark.engines import DOES, OURS, PEERS
from minillm_cli.benchmark.measure import devices_of, measure
from minillm_cli.benchmark.report import report
from minillm_cli.benchmark.results import Results
from minillm_cli.console import parse, say
from minillm_core.config import RunConfig, load_config, to_dict
from minillm_core.errors import InputError, missing_package
from minillm_core.files import make_folder, replace_file, user_path
from minillm_core.model.params import count_params
from minillm_core.version import __version__

NEEDS: dict[str, list[tuple[str, str | None]]] = {
    "jax": [("jax", None)],
    "torch": [("torch", "torch")],
    "torch-compiled": [("torch", "torch")],
    "transformers": [("torch", "torch"), ("transformers", "transformers")],
    "llama.cpp": [("cyllama", "test"), ("gguf", "gguf")],
}
"""Engine -> its packages, and the extra that installs each."""


def main() -> None:
    parse(benchmark)


def benchmark(
    preset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[PRESET|FILE.yaml]")]] = "mini-llm-50m",
    works: Annotated[tuple[str, ...], tyro.conf.arg(metavar="train|prefill|decode ...")] = WORKS,
    engines: Annotated[tuple[str, ...], tyro.conf.arg(metavar="jax|torch|torch-compiled ...")] = ("jax", "torch"),
    peers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="transformers|llama.cpp ...")] = (),
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    rows: int | None = None,
    seq_len: int | None = None,
    grad_accum: int = 1,
    steps: int | None = None,
    decode_rows: tuple[int, ...] = (1, 16),
    tokens: int = 128,
    prompt: int = 32,
    rounds: int = 5,
    out: str | None = None,
) -> None:
    """Measures training, prompt processing and decoding, next to other libraries and to what this machine can do.

    Weights and tokens are random, so it needs no data. Every engine runs in its own process, and the engines take
    turns. Compilation is not in the times.

    Args:
        preset: the model's shape and the settings of the optimizer.
        works: what to measure: train (one step: forward, backward, clipping, AdamW), prefill (a prompt into a cache),
            decode (greedy, the whole call).
        engines: of this project. torch-compiled decodes with torch.compile.
        peers: other libraries, to compare with.
        dtype: auto means bfloat16 on a GPU, else float32.
        rows: sequences of a training step (default: 2, on a GPU 64).
        seq_len: tokens of a sequence and of the prompt of prefill (default: 512, or what the context allows).
        grad_accum: micro-batches of a training step.
        steps: training steps per round (default: 2, on a GPU 10).
        decode_rows: how many prompts are continued together; several have different lengths.
        tokens: new tokens of every row.
        prompt: tokens of a prompt; several prompts have lengths from a quarter to the double of it.
        rounds: how often each engine is timed.
        out: a folder for report.md and results.json.
    """
    config = load_config(preset)
    _check_names("work", works, WORKS)
    _check_names("engine", engines, OURS)
    _check_names("peer", peers, PEERS)
    counts: dict[str, int | None] = {
        "rows": rows,
        "seq-len": seq_len,
        "grad-accum": grad_accum,
        "steps": steps,
        "tokens": tokens,
    }
    counts |= {"prompt": prompt, "rounds": rounds, "decode-rows": min(decode_rows, default=0)}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"--{name} is out of range", expected="1 or more", found=value)
    names = [*engines, *peers]
    _check_installed(names)
    folder = None if out is None else _output_folder(out)
    devices = devices_of(names)
    on_gpu = any(device["gpu"] for device in devices.values())
    dtype = ("bfloat16" if on_gpu else "float32") if dtype == "auto" else dtype
    context = config.model.context_length
    length = min(512, context) if seq_len is None else seq_len
    cases: list[Case] = []
    if "train" in works:
        n_rows, n_steps = rows or (64 if on_gpu else 2), steps or (10 if on_gpu else 2)
        cases.append(train_case(config, dtype, n_rows, length, grad_accum, n_steps))
    if "prefill" in works:
        cases.append(Case("prefill", config, dtype, 1, min(length, context - 2)))
    if "decode" in works:
        cases += [Case("decode", config, dtype, n, prompt, tokens) for n in dict.fromkeys(decode_rows)]
        _check_fits(cases, context)
    results = Results(_about(preset, config, devices, on_gpu, dtype, rounds), peers or _reference(engines))

    def save() -> None:
        if folder is not None:
            make_folder(folder)
            replace_file(folder / "results.json", results.to_json())
            replace_file(folder / "report.md", report(results))

    for case in cases:
        measure(case, names, rounds, results, say)
        save()
    results.complete = True
    save()
    print(report(results))
    if results.problems or results.failed:
        failures = [f"{failure['case']}: {failure['engine']} failed" for failure in results.failed]
        raise InputError("the benchmark found problems:\n  " + "\n  ".join([*results.problems, *failures]))


def _check_names(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"unknown {kind}", expected=", ".join(known), found=repr(name))
    if len(set(given)) < len(given):
        raise InputError(f"a {kind} is given twice", found=" ".join(given), hint="give it once")


def _check_installed(names: Sequence[str]) -> None:
    """Raises InputError for a package that an engine needs and that is not installed."""
    for name in names:
        for package, extra in NEEDS[name]:
            if importlib.util.find_spec(package) is None:
                error = ModuleNotFoundError(f"No module named {package!r}", name=package)
                raise missing_package(error, extra, where=f"the engine {name}")


def _check_fits(cases: Sequence[Case], context: int) -> None:
    for case in cases:
        longest = max(case.lengths()) + case.repeats
        if case.work == "decode" and longest > context:
            found = f"{max(case.lengths())} tokens + {case.repeats} new ones"
            hint = "lower --prompt or --tokens (several prompts have up to twice the length of --prompt)"
            raise InputError("a text is longer than the context", expected=f"at most {context}", found=found, hint=hint)


def _output_folder(out: str) -> Path:
    """The folder for the results; it may hold those of an earlier run."""
    folder = user_path(out)
    if folder.exists() and not folder.is_dir():
        hint = "give a different name, or remove it"
        raise InputError("--out is not a folder", expected="a folder", found="a file", where=folder, hint=hint)
    return folder


def _reference(engines: Sequence[str]) -> tuple[str, ...]:
    """Without a peer, engines are compared with torch."""
    return ("torch",) if "torch" in engines else (engines[0],)


def _about(
    preset: str, config: RunConfig, devices: dict[str, dict[str, Any]], on_gpu: bool, dtype: str, rounds: int
) -> dict[str, Any]:
    versions: dict[str, str] = {}
    for device in devices.values():
        versions |= device["versions"]
    return {
        "minillm": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["minillm", "benchmark", *sys.argv[1:]]),
        "device": next(device["device"] for device in devices.values() if device["gpu"] == on_gpu),
        "gpu": on_gpu,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "preset": preset,
        "n_params": count_params(config.model),
        "dtype": dtype,
        "rounds": rounds,
        "config": to_dict(config),
        "works": {name: list(DOES[name]) for name in devices},
    }
