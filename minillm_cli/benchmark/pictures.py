"""roofline.png and scaling.png."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from minillm_cli.benchmark.cases import total
from minillm_cli.benchmark.results import Results
from minillm_core.training.plots import write_figure

MARKERS = "os^Dv<>P*X"


def draw_roofline(results: Results, picture: Path) -> None:
    """Arithmetic intensity against achieved FLOP/s of every row, under the roof that was measured in the same run."""
    from matplotlib.figure import Figure  # takes 0.3 s to import
    from matplotlib.lines import Line2D

    bound = results.bound()
    engines = list(dict.fromkeys(row.engine for row in results.rows))
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    ridge = bound.flops / bound.bandwidth
    intensities = [total(case).flops / total(case).bytes for case in results.cases()]
    low, high = min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3
    xs = np.array([low, ridge, high])
    axes.plot(xs, np.minimum(bound.flops, bound.bandwidth * xs), "k-", linewidth=1)
    label = f"{bound.flops / 1e12:.3g} TFLOP/s, {bound.bandwidth / 1e9:.3g} GB/s"
    legend: list[Any] = [Line2D([], [], color="k", linewidth=1, label=label)]
    for i, case in enumerate(results.cases()):
        marker, cost = MARKERS[i % len(MARKERS)], total(case)
        legend.append(Line2D([], [], color="grey", marker=marker, linestyle="", label=case.name))
        for row in results.of(case):
            rate, color = cost.flops / statistics.median(row.seconds), f"C{engines.index(row.engine)}"
            axes.plot(cost.flops / cost.bytes, rate, marker=marker, color=color, linestyle="", alpha=0.8)
    for i, engine in enumerate(engines):
        legend.append(Line2D([], [], color=f"C{i}", linewidth=4, label=engine))
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="achieved FLOP/s")
    about = results.about
    axes.set_title(f"{about['preset']} on {about['device']}, {about['dtype']}", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(handles=legend, loc="outside lower left", ncols=3, fontsize="small")
    write_figure(figure, picture)


def draw_scaling(scaling: dict[str, Any], picture: Path) -> None:
    """One log-log panel for each thing that grows: measured times, and the least time by the operations and bytes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    sweeps = scaling["sweeps"]
    n_rows = -(-len(sweeps) // 3)
    figure = Figure(figsize=(11, 3.6 * n_rows), dpi=70, layout="constrained")
    panels = figure.subplots(n_rows, 3, squeeze=False).flat
    for sweep, axes in zip(sweeps, panels, strict=False):
        expected = sweep["expected"]
        axes.plot(sweep["x"], expected["seconds"], "k--", linewidth=1, label=f"bound, slope {expected['slope']:.2f}")
        for i, (engine, found) in enumerate(sweep["engines"].items()):
            label = f"{engine}, slope {found['slope']:.2f}"
            axes.plot(sweep["x"], found["seconds"], f"C{i}o-", markersize=4, linewidth=1, label=label)
        axes.set(xscale="log", yscale="log", xlabel=sweep["name"], ylabel=f"seconds per {sweep['per']}")
        axes.set_xticks(sweep["x"])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in [*panels]:
        axes.remove()
    write_figure(figure, picture)
