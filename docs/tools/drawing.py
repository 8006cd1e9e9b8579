"""How the figures of `docs/learn/` are drawn: a list of all of them, their style and colours."""

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from minillm_core.config import load_config
from minillm_core.model.diagram import diagram

FOLDER = Path(__file__).parents[1] / "learn" / "images"
STYLE = {
    "path.simplify": False,
    "svg.hashsalt": "learn",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
}
BLUE, RED, GREY, GREEN = "#3b5bdb", "#c92a2a", "#868e96", "#2b8a3e"
MINI = load_config("mini-llm-50m").model

FIGURES: dict[str, Callable[[], str]] = {"architecture": lambda: diagram(load_config("mini-llm-50m"))}
"""Name of the file, without .svg -> draws it."""


def figure(draw: Callable[[Figure], None]) -> Callable[[Figure], None]:
    """Adds a drawing to FIGURES, under the name of its function."""

    def svg() -> str:
        with matplotlib.rc_context(STYLE):
            canvas = Figure(figsize=(7.2, 2.9), layout="constrained")
            draw(canvas)
            content = io.StringIO()
            FigureCanvasSVG(canvas).print_svg(content, metadata={"Date": None})
        return content.getvalue()

    FIGURES[draw.__name__] = svg
    return draw


def finish(axes: Axes, *, xlabel: str, ylabel: str, title: str = "") -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
