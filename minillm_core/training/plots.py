"""Loss plots."""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.errors import InputError
from minillm_core.files import as_text, replace_file
from minillm_core.training.curves import AXIS_LABELS, FIELD_LABELS, Axis, RunCurves
from minillm_core.training.metrics import Row, losses_by_step

SPLITS = {"train": "-", "val": "o--"}
"""Split -> line style."""


def plot_loss(rows: Sequence[Row], picture: Path) -> None:
    """Draws the train and held-out loss of a run, in nats per token, as a PNG."""
    from matplotlib.figure import Figure  # takes 0.3 s to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for split, style in SPLITS.items():
        if points := losses_by_step(rows, split):
            axes.plot(list(points), list(points.values()), style, markersize=3, linewidth=1, label=split)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    _save(figure, picture)


def plot_two_losses(runs: Mapping[str, Sequence[Row]], picture: Path) -> dict[str, dict[int, float]]:
    """Draws the losses of two runs and, below them, their absolute difference, as a PNG.

    Args:
        runs: the metrics rows of each run; the keys are the names in the legend.

    Returns:
        for each split, the absolute difference at every step that both runs have.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    differences = {}
    for split, color in (("train", "C0"), ("val", "C1")):
        (name, points), (other_name, other_points) = (
            (name, losses_by_step(rows, split)) for name, rows in runs.items()
        )
        above.plot(list(points), list(points.values()), color + "-", linewidth=2, alpha=0.4, label=f"{split}, {name}")
        above.plot(
            list(other_points), list(other_points.values()), color + "--", linewidth=1, label=f"{split}, {other_name}"
        )
        apart = {step: abs(points[step] - other_points[step]) for step in points if step in other_points}
        below.plot(list(apart), list(apart.values()), color + ".-", markersize=3, linewidth=1, label=split)
        differences[split] = apart
    if any(value > 0 for apart in differences.values() for value in apart.values()):
        below.set_yscale("log", nonpositive="mask")
    above.set(ylabel="loss (nats per token)")
    below.set(xlabel="step", ylabel="absolute difference")
    _save(figure, picture)
    return differences


def plot_curves(runs: Sequence[RunCurves], fields: Sequence[str], axis: Axis, picture: Path) -> None:
    """Draws metrics of runs, one panel for each metric and one colour for each run, as a PNG or an SVG.

    Args:
        axis: the horizontal axis: `step`, `tokens`, `flops` or `time`.
        picture: the file to write; its suffix is .png or .svg.

    Raises:
        InputError: no run has a finite value of a metric; every metric that the runs have is named.
    """
    known = set().union(*(run.fields for run in runs))
    if not fields:
        raise InputError("no metric to draw", expected=f"one or more of {', '.join(sorted(known))}", found="none")
    for field in fields:
        if not any(run.points(field, split, axis) for run in runs for split in SPLITS):
            expected = f"one of {', '.join(sorted(known))}"
            problem = "no value of this metric can be drawn" if field in known else "the runs have no such metric"
            raise InputError(problem, expected=expected, found=field, where=", ".join(str(run.folder) for run in runs))

    from matplotlib import colormaps
    from matplotlib.figure import Figure

    few = len(runs) <= 10
    colors = [f"C{i}" for i in range(10)] if few else [*colormaps["turbo"](np.linspace(0, 1, len(runs)))]
    n_columns = min(2, len(fields))
    n_rows = -(-len(fields) // n_columns)
    height = 0.6 + 3.2 * n_rows + 0.2 * len(runs)
    figure = Figure(figsize=(1.5 + 5 * n_columns, height), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flat
    drawn: dict[str, Any] = {}
    for field, axes in zip(fields, panels, strict=False):
        for name, run, color in zip(_names(runs), runs, colors, strict=False):
            for split, line in SPLITS.items():
                if points := run.points(field, split, axis):
                    (curve,) = axes.plot(*zip(*points, strict=True), line, color=color, markersize=3, linewidth=1)
                    drawn.setdefault(f"{name}, {split}", curve)
        axes.set(xlabel=AXIS_LABELS[axis], ylabel=FIELD_LABELS.get(field, field))
        axes.grid(alpha=0.3)
    for axes in [*panels]:
        axes.remove()
    figure.legend(drawn.values(), drawn, loc="outside lower left", ncols=2, fontsize="small")
    write_figure(figure, picture)


def _names(runs: Sequence[RunCurves]) -> list[str]:
    """The folders of runs without what they have in common, as text that matplotlib shows as it is."""
    parents = {run.folder.parent for run in runs}
    common = Path(os.path.commonpath(parents)) if len(parents) > 1 else Path()
    names = (run.folder.relative_to(common) for run in runs)
    return [as_text(str(name)).replace("$", r"\$") for name in names]


def _save(figure: Any, picture: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    write_figure(figure, picture)


def write_figure(figure: Any, picture: Path) -> None:
    """Writes a figure of matplotlib as a PNG or, by its suffix, an SVG. An existing file is replaced."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks a letter of a run's name
        if picture.suffix.lower() == ".svg":
            with rc_context({"svg.fonttype": "none", "svg.hashsalt": "minillm"}):  # the same curves give the same file
                FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
        else:
            FigureCanvasAgg(figure).print_png(content)
    replace_file(picture, content.getvalue())
