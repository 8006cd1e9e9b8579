"""The report in Markdown."""

import statistics

from minillm_cli.benchmark.cases import Case, least_seconds
from minillm_cli.benchmark.results import Results, Row

HEADINGS = {"train": "Training", "prefill": "Processing a prompt", "decode": "Decoding"}


def report(results: Results) -> str:
    about = results.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# {about['preset']} on {about['device']}, {about['dtype']}",
        "",
        f"`{about['command']}`",
        "",
        f"- {about['date']}; {about['cores']} CPU cores; Python {about['python']}; {about['system']}",
        f"- minillm {about['minillm']}; {versions}",
        f"- {about['n_params']:,} parameters with random values; random tokens; "
        f"the engines take turns in {about['rounds']} round(s)",
    ]
    elsewhere = [f"{name} computes on {d}" for name, d in about["devices"].items() if d != about["device"]]
    lines += [f"- {'; '.join(elsewhere)}"] if elsewhere else []
    if not results.complete:
        lines += ["", "**This report is not complete: the run was still going on, or was interrupted.**"]
    if results.bounds:
        lines += ["", *_bounds(results)]
    for work, heading in HEADINGS.items():
        cases = [case for case in results.cases() if case.work == work]
        if cases:
            lines += ["", f"## {heading}", "", *_table(results, cases)]
    if results.rows:
        lines += ["", *NOTES]
    if results.scaling is not None:
        lines += ["", *_scaling(results)]
    if results.problems or results.failed:
        lines += ["", "## Problems", "", *(f"- {problem}" for problem in results.problems)]
        for failure in results.failed:
            problem = failure["problem"].splitlines()
            lines += [f"- {failure['case']}: {failure['engine']} failed: {problem[0]}"]
    return "\n".join([*lines, ""])


NOTES = (
    "Rates are medians of the rounds, with the range. `times X` is the speed relative to the engine X, the median over "
    "the rounds. The bound is the rate at which matrix products (compute) or reading weights and cache (memory) alone "
    "would take all the time, at the largest rates above. Memory is the peak of the engine's process (on a GPU: of the "
    "framework's memory there). jax and torch have the settings of this project's commands (threads, malloc); other "
    "engines keep their defaults.",
)


def _bounds(results: Results) -> list[str]:
    lines = ["| bound, measured in this run | " + " | ".join(results.bounds) + " |"]
    lines.append("|---" * (1 + len(results.bounds)) + "|")
    flops = " | ".join(f"{bound.flops / 1e12:,.3g} TFLOP/s" for bound in results.bounds.values())
    bandwidth = " | ".join(f"{bound.bandwidth / 1e9:,.3g} GB/s" for bound in results.bounds.values())
    return [*lines, f"| large matrix product | {flops} |", f"| reading and writing memory | {bandwidth} |"]


def _table(results: Results, cases: list[Case]) -> list[str]:
    rows = [row for case in cases for row in results.of(case)]
    references = [name for name in results.references if any(row.engine == name for row in rows)]
    columns = ["work", "engine", "token/s, median (range)", *(f"times {name}" for name in references)]
    columns += ["bound, token/s", "share of the bound", "peak memory"]
    trains = any(row.loss is not None for row in rows)
    if trains:
        columns.append("loss after all steps")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(_cells(results, row, references, trains)) + " |" for row in rows]


def _cells(results: Results, row: Row, references: list[str], trains: bool) -> list[str]:
    rates, ratios = row.rates, results.ratios(row)
    cells = [row.case.name, row.engine]
    cells.append(f"{_short(statistics.median(rates))} ({_short(min(rates))} to {_short(max(rates))})")
    cells += [f"{ratios[reference]:.2f}" if reference in ratios else "" for reference in references]
    if results.bounds:
        least, limit = least_seconds(row.case, results.bound())
        cells += [f"{_short(row.case.tokens_per_round / least)} ({limit})", f"{results.share(row):.0%}"]
    else:
        cells += ["", ""]
    cells.append(f"{row.peak_bytes / 1e9:.2f} GB")
    if trains:
        cells.append(f"{row.loss:.5f}" if row.loss is not None else "")
    return cells


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _scaling(results: Results) -> list[str]:
    assert results.scaling is not None
    engines = list(results.scaling["sweeps"][0]["engines"])
    columns = ["what grows", "from, to", "bound", *engines]
    lines = ["## How cost grows", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for sweep in results.scaling["sweeps"]:
        slopes = [sweep["expected"]["slope"], *(sweep["engines"][name]["slope"] for name in engines)]
        cells = [f"{sweep['name']}, time of a {sweep['per']}", f"{sweep['x'][0]:,} to {sweep['x'][-1]:,}"]
        lines.append("| " + " | ".join([*cells, *(f"{slope:.2f}" for slope in slopes)]) + " |")
    return [*lines, "", SLOPES]


SLOPES = (
    "Slopes in a log-log plot (`scaling.png`): with slope 1, twice the size takes twice the time. The bound is "
    "computed from operations and bytes. Small sizes take longer than it says, which makes the measured slopes smaller."
)
