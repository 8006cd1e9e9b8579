"""Loss plots."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm_core.errors import InputError
from minillm_core.files import replace_file
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
    for field in fields:
        if not any(run.points(field, split, axis) for run in runs for split in SPLITS):
            expected = f"one of {', '.join(sorted(known))}"
            problem = "no finite value of this metric" if field in known else "unknown metric"
            raise InputError(problem, expected=expected, found=field, where=", ".join(str(run.folder) for run in runs))

    from matplotlib.figure import Figure

    n_columns = min(2, len(fields))
    n_rows = -(-len(fields) // n_columns)
    figure = Figure(figsize=(1.5 + 5 * n_columns, 0.6 + 3.2 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flat
    for field, axes in zip(fields, panels, strict=False):
        for number, run in enumerate(runs):
            curves = {split: points for split in SPLITS if (points := run.points(field, split, axis))}
            for split, points in curves.items():
                label = f"{run.folder}, {split}" if len(curves) > 1 else str(run.folder)
                label = label.encode(errors="replace").decode()  # the name of a folder need not be valid UTF-8
                style = {"color": f"C{number}", "markersize": 3, "linewidth": 1, "label": label}
                axes.plot(*zip(*points, strict=True), SPLITS[split], **style)
        axes.set(xlabel=AXIS_LABELS[axis], ylabel=FIELD_LABELS.get(field, field))
    for axes in [*panels]:
        axes.remove()
    _save(figure, picture)


def _save(figure: Any, picture: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    content = io.BytesIO()
    if picture.suffix == ".svg":
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "minillm"}):  # the same curves give the same file
            FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
    else:
        FigureCanvasAgg(figure).print_png(content)
    replace_file(picture, content.getvalue())
