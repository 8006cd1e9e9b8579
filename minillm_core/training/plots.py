"""Loss plots."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm_core.files import replace_file
from minillm_core.training.metrics import Row, losses_by_step


def plot_loss(rows: Sequence[Row], picture: Path) -> None:
    """Draws the train and held-out loss of a run, in nats per token, as a PNG."""
    from matplotlib.figure import Figure  # takes 0.3 s to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for split, style in (("train", "-"), ("val", "o-")):
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


def _save(figure: Any, picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    replace_file(picture, content.getvalue())
