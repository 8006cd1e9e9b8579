"""An earlier results.json, and what has become slower since."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm_cli.benchmark.engines import OURS, PEERS
from minillm_cli.benchmark.results import FORMAT, VERSION
from minillm_core.errors import InputError, listed
from minillm_core.files import user_path

Change = dict[str, Any]
"""One compared number: `case`, `engine`, `what` it is, `then`, `now`, and `change`, now / then."""


def read_results(name: str) -> dict[str, Any]:
    """Reads and checks a results.json.

    Raises:
        InputError: it does not exist, or is not the complete result of this version of the benchmark.
    """
    path = user_path(name)
    expected, hint = "the results.json of an earlier benchmark", "write one with --out FOLDER"

    def wrong(problem: str, found: object) -> InputError:
        return InputError(problem, expected=expected, found=found, where=path, hint=hint)

    if not path.is_file():
        raise wrong("--against is not a file", "a folder" if path.is_dir() else "nothing")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise wrong("the file is not JSON, or damaged", error) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise wrong("not the results of a benchmark", f"no field `format: {FORMAT}`")
    if data.get("version") != VERSION:
        raise wrong("the results have a different version", f"version {data.get('version')!r}, not {VERSION}")
    if problems := list(_damage(data)):
        raise wrong(listed("the results are damaged", problems), f"{len(problems)} problem(s)")
    if not data["complete"]:
        raise wrong("the results are not complete", "a run that was interrupted")
    return data


def _damage(data: dict[str, Any]) -> Iterator[str]:
    kinds = {"complete": bool, "device": str, "cores": int, "dtype": str, "config": dict, "versions": dict}
    for name, kind in {**kinds, "rows": list}.items():
        if not isinstance(data.get(name), kind):
            yield f"{name}: expected {kind.__name__}, found {str(data.get(name))[:40]!r}"
    rows = data.get("rows")
    for i, row in enumerate(rows if isinstance(rows, list) else []):
        is_row = isinstance(row, dict) and isinstance(row.get("ratios"), dict)
        numbers = [row.get("share"), *row["ratios"].values()] if is_row else [None]
        names = [row.get("case"), row.get("engine")] if is_row else [None]
        if not all(isinstance(name, str) for name in names) or not all(
            isinstance(x, float) and math.isfinite(x) and x > 0 for x in numbers
        ):
            yield f"rows[{i}]: expected a case, an engine, a share and ratios above 0, found {str(row)[:60]!r}"


def require_comparable(then: dict[str, Any], now: dict[str, Any], where: object) -> None:
    """Raises InputError if the runs differ in the machine, the dtype or the model. Shares and ratios depend on these: a
    different processor changes them even if the code is the same."""
    fields = {name: (now[name], then[name]) for name in ("device", "cores", "dtype")}
    models = now["config"]["model"], then["config"].get("model")
    fields["model"] = models if models[0] != models[1] else ("", "")
    differences = [f"{name}: {ours}, was {theirs}" for name, (ours, theirs) in fields.items() if ours != theirs]
    if differences:
        hint = "compare with a run on the same machine and with the same options, or leave out --against"
        raise InputError(listed("the results cannot be compared", differences), where=where, hint=hint)


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Share of the bound, and ratio to every peer, of each row that both have. Peers themselves are not compared, nor
    this project's engines with each other: one that becomes faster is no loss for the other.

    Raises:
        InputError: they have no row in common.
    """
    earlier = {(row["case"], row["engine"]): row for row in then["rows"]}
    found: list[Change] = []
    for row in now["rows"]:
        old = earlier.get((row["case"], row["engine"]))
        if old is None or row["engine"] not in OURS:
            continue
        pairs = {"share of the bound": (old["share"], row["share"])}
        for peer in PEERS:
            if peer in old["ratios"] and peer in row["ratios"]:
                pairs[f"times {peer}"] = old["ratios"][peer], row["ratios"][peer]
        for what, (a, b) in pairs.items():
            found.append(
                {"case": row["case"], "engine": row["engine"], "what": what, "then": a, "now": b, "change": b / a}
            )
    if not found:
        expected, there = (", ".join(sorted({row["case"] for row in data["rows"]})) for data in (now, then))
        hint = "measure the same works at the same sizes"
        raise InputError("the results have no row in common", expected=expected, found=there, hint=hint)
    return found


def fallen(compared: list[Change], tolerance: float) -> list[str]:
    """The numbers that fell by more than a share of their earlier value."""
    return [
        f"{c['case']}, {c['engine']}: {c['what']} {c['now']:.3g}, was {c['then']:.3g} ({c['change'] - 1:+.0%})"
        for c in compared
        if c["change"] < 1 - tolerance
    ]


def comparison_table(compared: list[Change], then: dict[str, Any], now: dict[str, Any]) -> str:
    """Markdown."""
    both = {name: (then["versions"].get(name), version) for name, version in now["versions"].items()}
    versions = [f"{name} {a} -> {b}" for name, (a, b) in both.items() if a is not None and a != b]
    lines = [f"Compared with the run of {then.get('date')}" + (f" ({', '.join(versions)})" if versions else "") + ":"]
    lines += ["", "| work | engine | compared | then | now | now / then |", "|---|---|---|---|---|---|"]
    for c in compared:
        lines.append(
            f"| {c['case']} | {c['engine']} | {c['what']} | {c['then']:.3g} | {c['now']:.3g} | {c['change']:.2f} |"
        )
    return "\n".join([*lines, ""])


def is_results(path: Path) -> bool:
    """Whether a file is the results.json of a benchmark, complete or not."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT
