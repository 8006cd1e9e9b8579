"""Measures cases: the engines of a case take turns, round by round."""

from collections.abc import Callable, Sequence
from typing import Any

from minillm_cli.benchmark.cases import Case
from minillm_cli.benchmark.engines import DOES, framework_of
from minillm_cli.benchmark.results import Results, Row
from minillm_cli.benchmark.team import Engine, EngineError, team
from minillm_core.errors import InputError
from minillm_core.model.tolerance import TOLERANCES

LOSS = {"float32": TOLERANCES["float32"].run_loss, "bfloat16": 1e-2}
"""How far the losses of two engines may be apart, relative to the loss, after the steps of a benchmark."""


def devices_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Engine -> its device and versions.

    Raises:
        InputError: an engine does not start, or the frameworks compute on different devices.
    """
    found = {}
    with team(names, "decode") as engines:
        for engine in engines.values():
            engine.send("hello")
        for name, engine in engines.items():
            try:
                found[name] = engine.receive()
            except EngineError as error:
                raise InputError(f"the engine {name} does not start", found=error) from error
    kinds = {name: found[name]["gpu"] for name in found if name != "llama.cpp"}
    if len(set(kinds.values())) > 1:
        where = ", ".join(f"{name}: {found[name]['device']}" for name in kinds)
        hint = (
            "install the frameworks with support for this GPU, hide it (CUDA_VISIBLE_DEVICES=), or measure one engine"
        )
        raise InputError("the engines compute on different devices", expected="one", found=where, hint=hint)
    return found


def measure(case: Case, names: Sequence[str], rounds: int, results: Results, tell: Callable[[str], None]) -> None:
    """Adds the rows of a case to the results. An engine that fails is recorded and left out."""
    with team([name for name in names if case.work in DOES[name]], case.work) as engines:
        for engine in engines.values():
            engine.send("hello")  # all import at once

        def fail(name: str, error: EngineError) -> None:
            engines[name].close()
            del engines[name]
            results.failed.append({"case": case.name, "engine": name, "problem": str(error)})
            tell(f"warning: {case.name}: {name} failed: {error}")

        for name in [*engines]:
            try:
                engines[name].receive()
                seconds = engines[name].ask("prepare", case=case.to_json())["seconds"]
                tell(f"{case.name}: {name} is ready: built, compiled and run twice in {seconds:.1f} s")
            except EngineError as error:
                fail(name, error)
        times: dict[str, list[float]] = {name: [] for name in engines}
        losses: dict[str, float | None] = {}
        for _ in range(rounds):
            for name in [*engines]:
                try:
                    done = engines[name].ask("run")
                except EngineError as error:
                    fail(name, error)
                    continue
                times[name].append(done["seconds"])
                losses[name] = done["loss"]
        for name, engine in engines.items():
            results.rows.append(Row(case, name, times[name], engine.ask("peak")["bytes"], losses[name]))
        measure_bounds(case.dtype, engines, results)
    results.problems += different_losses(results.of(case))


def measure_bounds(dtype: str, engines: dict[str, Engine], results: Results) -> None:
    """Measures the bounds in one process of each framework."""
    seen = set()
    for name, engine in engines.items():
        framework = framework_of(name)
        if framework and framework not in seen:
            seen.add(framework)
            rates = engine.ask("bounds", dtype=dtype)
            results.see(framework, rates["flops"], rates["bandwidth"])


def different_losses(rows: Sequence[Row]) -> list[str]:
    """Pairs of engines whose losses differ by more than rounding, after the same steps from the same weights."""
    trained = [row for row in rows if row.loss is not None]
    problems = []
    for row in trained[1:]:
        first = trained[0]
        assert first.loss is not None
        assert row.loss is not None
        limit = LOSS[row.case.dtype]
        if not abs(row.loss - first.loss) <= limit * max(1.0, abs(first.loss)):
            problems.append(
                f"{row.case.name}: the losses of {first.engine} ({first.loss:.6f}) and {row.engine} ({row.loss:.6f}) "
                f"differ by more than {limit:g} of the loss"
            )
    return problems
