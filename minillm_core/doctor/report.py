"""The doctor's report as text for the terminal, as an HTML page and as JSON."""

import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from minillm_core.doctor.examine import Difference, Report
from minillm_core.doctor.findings import Finding
from minillm_core.model.stages import BLOCK_STAGES
from minillm_core.model.tolerance import TOLERANCES

COLUMNS = ("norm 1", "q", "k", "v", "attention", "norm 2", "MLP", "block")
"""The table's column names for BLOCK_STAGES."""


PAGE_BEGINS = "<!doctype html>"
"""The first characters of every page."""


def json_report(report: Report) -> str:
    """Everything except the sample of logits, as JSON. NaN and infinity become null."""
    data = {key: value for key, value in asdict(report).items() if key != "logits"}
    return json.dumps(finite(data), indent=1)


def finite(value: Any) -> Any:
    """A value for JSON, with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_report(report: Report, *, color: bool) -> str:
    """The report for the terminal: a table of relative errors (one row per layer), the numbers and the findings."""
    first = report.first_divergence.stage if report.first_divergence else None

    def cell(stage: Difference) -> str:
        text = f"{'>' if stage.name == first else ''}{stage.relative:.0e}".rjust(10)
        return f"\033[1;31m{text}\033[0m" if color and stage.name == first else text

    lines = [
        *summary(report),
        "",
        "largest error over largest value:",
        " " * 12 + "".join(c.rjust(10) for c in COLUMNS),
    ]
    for name, cells in table(report):
        lines.append(name.ljust(12) + "".join(map(cell, cells)))
    lines += ["", *_numbers(report), ""]
    if report.first_divergence:
        lines.append(f"first divergence: {report.first_divergence}")
    lines += _own_code(report)
    for i, finding in enumerate(report.findings, 1):
        lines += [
            f"{i}. {_place(finding)}: {finding.says} [{finding.fault}]",
            f"   {finding.evidence}",
        ]
    return "\n".join([*lines, verdict(report)])


def summary(report: Report) -> list[str]:
    """What was compared."""
    rows, columns = report.tokens
    text = f"{rows - report.rows_of_text} rows of random ids, {report.rows_of_text} of text"
    return [f"A  {report.a}", f"B  {report.b}", f"{report.dtype}, {rows} x {columns} tokens: {text}"]


def verdict(report: Report) -> str:
    """Whether the models are equal, and the tolerances used."""
    if report.dtype in TOLERANCES:
        bounds = TOLERANCES[report.dtype]
        measure = f"{report.dtype}: {bounds.logits:.0e} for every stage, {bounds.gradient:.0e} for every gradient"
    else:
        measure = "bfloat16: next-token distributions and gradient directions"
    return f"{'EQUAL' if report.equal else 'NOT EQUAL'} within the tolerance of {measure}"


def table(report: Report) -> list[tuple[str, list[Difference]]]:
    """The rows of the table: one for each layer, and one for each stage outside the layers."""
    rows: dict[str, list[Difference]] = {}
    for stage in report.stages:
        layer = re.match(r"model\.layers\.(\d+)", stage.name)
        rows.setdefault(f"layer {layer[1]}" if layer else stage.name.removeprefix("model."), []).append(stage)
    return list(rows.items())


def _numbers(report: Report) -> list[str]:
    """The results that are single numbers."""
    losses, gradients = report.losses, report.gradients
    lines = [
        f"mean loss: {report.mean_loss[0]:.9g} and {report.mean_loss[1]:.9g} nats; "
        f"largest difference of a token {losses.max_error:.1e}",
        f"mean KL divergence: {report.mean_kl:.1e} nats; top-k agreement: "
        + ", ".join(f"{k}: {share:.2%}" for k, share in report.top_k.items()),
        "gradients: not compared",
    ]
    if gradients:
        n_agree = sum(gradient.agrees for gradient in gradients)
        worst = max(gradients, key=lambda gradient: gradient.norm)
        lines[-1] = (
            f"gradients: {n_agree} of {len(gradients)} agree; "
            f"difference at most {worst.norm:.1e} of the norm ({worst.name}), "
            f"cosine at least {min(gradient.cosine for gradient in gradients):.6f}"
        )
    if report.weights:
        worst = max(report.weights, key=lambda weight: weight.norm)
        lines.append(f"weights: {len(report.weights)} differ, by at most {worst.norm:.1e} of the norm ({worst.name})")
    if report.configuration:
        fields = (f"{key} is {x} in A, {y} in B" for key, (x, y) in report.configuration.items())
        lines.append(f"configuration: {'; '.join(fields)}")
    return [*lines, f"tokenizers: {report.tokenizers}"]


def _place(finding: Finding) -> str:
    """The place of a finding. Files only show that they differ, not which one is right, hence `B against A`."""
    return f"{finding.subject}'s code" if finding.place == "code" else f"{finding.place}, B against A"


def _own_code(report: Report) -> list[str]:
    """For each model, whether its code computes what its files say."""
    if report.equal and not report.findings:
        return []
    wrong = {finding.subject for finding in report.findings if finding.place == "code"}
    return [f"{x}'s code {'does not compute' if x in wrong else 'computes'} what its files say" for x in "AB"]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em } p.path { margin: .2em 0; overflow-wrap: anywhere }
.verdict { padding: .7em 1em; border-radius: 6px; font-weight: 600; background: #e3f4e6 }
.verdict.bad { background: #fbe4e2 }
ol li { margin: .6em 0 } .evidence { color: #566; font-size: .92em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88em }
td, th { padding: .25em .6em; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.scroll { overflow-x: auto } td.first { outline: 3px solid #c0221b; font-weight: 700 }
figure { margin: 1em 0 } figure svg { max-width: 100%; height: auto } code { background: #f1f3f6; padding: 0 .3em }
"""


def html_report(report: Report) -> str:
    """The report as one HTML page that refers to no other file."""
    e = html.escape
    first = report.first_divergence.stage if report.first_divergence else None
    body = ["<h1>Parity of two checkpoints</h1>", *(f'<p class="path">{e(line)}</p>' for line in summary(report))]
    body.append(f'<p class="verdict{"" if report.equal else " bad"}">{e(verdict(report))}</p>')
    if report.first_divergence:
        body.append(f"<p>First divergence: <code>{e(str(report.first_divergence))}</code></p>")
    if report.findings:
        items = (
            f"<li>{e(_place(f))}: <b>{e(f.says)}</b> <code>{e(f.fault)}</code>"
            f'<div class="evidence">{e(f.evidence)}</div></li>'
            for f in report.findings
        )
        own_code = "; ".join(_own_code(report))
        body.append(f"<h2>Diagnosis</h2><p>{own_code}.</p><ol>{''.join(items)}</ol>")
    body.append("<h2>Numbers</h2><ul>" + "".join(f"<li>{e(line)}</li>" for line in _numbers(report)) + "</ul>")
    body.append("<h2>Error by stage and layer</h2>" + _figure(_draw_stages, report))
    body.append("<h2>Logits and next tokens</h2>" + _figure(_draw_logits, report))
    head = "".join(f"<th>{column}</th>" for column in ("largest error over largest value", *COLUMNS))
    rows = []
    for name, cells in table(report):
        marked = (f"<td{_shade(c)}{' class=first' if c.name == first else ''}>{c.relative:.1e}</td>" for c in cells)
        rows.append(f"<tr><td>{e(name)}</td>{''.join(marked)}</tr>")
    body.append(f'<h2>Every stage</h2><div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>')
    body.append("<h2>Gradients, by parameter</h2>" + _list(report.gradients))
    if report.weights:
        body.append("<h2>Weights that differ</h2>" + _list(report.weights))
    return (
        f'{PAGE_BEGINS}<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Parity of two checkpoints</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _list(differences: Sequence[Difference]) -> str:
    columns = ("name", "largest error", "relative norm", "cosine")
    head = "".join(f"<th>{column}</th>" for column in columns)
    rows = (
        f"<tr><td>{html.escape(d.name)}</td><td>{d.max_error:.1e}</td><td{_shade(d)}>{d.norm:.1e}</td>"
        f"<td>{d.cosine:.6f}</td></tr>"
        for d in differences
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _shade(difference: Difference) -> str:
    return f' style="background: {"#e3f4e6" if difference.agrees else "#f6c6c1"}"'


def _figure(draw: Any, report: Report) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    draw(figure, report)
    content = io.StringIO()
    with rc_context({"svg.hashsalt": "parity"}):
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
    svg = content.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _draw_stages(figure: Any, report: Report) -> None:
    axes = figure.subplots()
    floor = 1e-18  # a logarithmic axis cannot show zero
    for suffix, label in zip(BLOCK_STAGES, COLUMNS, strict=True):
        pattern = re.compile(rf"model\.layers\.(\d+){re.escape('.' + suffix if suffix else '')}$")
        points = [(int(m[1]), max(s.relative, floor)) for s in report.stages if (m := pattern.match(s.name))]
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=label)
    outside = [stage for stage in report.stages if "layers" not in stage.name]
    last = max((int(m[1]) for s in report.stages if (m := re.match(r"model\.layers\.(\d+)$", s.name))), default=0)
    for position, stage in zip((-1, last + 1, last + 2), outside, strict=True):
        axes.plot(position, max(stage.relative, floor), "s", color="black", markersize=4)
    axes.set_xticks([-1, *range(last + 1), last + 1, last + 2])
    axes.set_xticklabels(["embedding", *map(str, range(last + 1)), "norm", "logits"], rotation=45 if last > 8 else 0)
    if report.dtype in TOLERANCES:
        bound = TOLERANCES[report.dtype].logits
        axes.axhline(bound, color="#c0221b", linewidth=1, linestyle="--", label="tolerance")
    axes.set(yscale="log", xlabel="layer", ylabel="largest error / largest value")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_logits(figure: Any, report: Report) -> None:
    scatter, agreement = figure.subplots(1, 2)
    points = np.stack(report.logits)
    points = points[:, np.isfinite(points).all(axis=0)]
    scatter.plot(*points, ".", markersize=2)
    ends = [points.min(initial=0), points.max(initial=0)]
    scatter.plot(ends, ends, color="#c0221b", linewidth=0.8)
    scatter.set(xlabel="logits of A", ylabel="logits of B")
    agreement.plot([str(k) for k in report.top_k], list(report.top_k.values()), "o-")
    agreement.set(xlabel="k", ylabel="positions with the same top k", ylim=(-0.03, 1.03))
    for axes in (scatter, agreement):
        axes.grid(alpha=0.3)
