"""The figures of `docs/learn/`, computed by the code that they explain: `python docs/tools/figures.py` writes them all.

`test_learn.py` draws them again and compares them with the files.
"""

import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from minillm_core.config import load_config
from minillm_core.model.diagram import diagram
from minillm_core.model.rope import inverse_frequencies, rope_table

FOLDER = Path(__file__).parents[1] / "learn" / "images"
STYLE = {"svg.hashsalt": "learn", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
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


def _finish(axes: Axes, *, xlabel: str, ylabel: str, title: str = "") -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


@figure
def rope(canvas: Figure) -> None:
    """Left: the angles of some channel pairs. Right: the error of scores with the wrong layout, by distance."""
    from minillm_jax.layers import apply_rope, rotation

    angles, scores = canvas.subplots(1, 2)
    positions = np.arange(64)
    frequencies = inverse_frequencies(MINI)
    for pair in (0, 4, 8, 16):
        angles.plot(positions, np.cos(positions * frequencies[pair]), label=f"pair {pair}")
    _finish(angles, xlabel="position", ylabel="cosine of the angle", title="each pair turns at its own speed")
    cos, sin = (table[:64].astype(np.float32)[None] for table in rope_table(MINI))
    factors = rotation(jax.numpy.asarray(cos), jax.numpy.asarray(sin))
    H, T = MINI.resolved_head_dim, len(positions)
    q_BT1H, k_BT1H = np.random.default_rng(0).standard_normal((2, 256, 1, 1, H)).astype(np.float32).repeat(T, axis=2)
    as_stored = np.arange(H).reshape(2, -1).T.reshape(-1)  # channels i and i + H/2 become neighbours
    right, wrong = (
        np.einsum("BH,BTH->BT", *(np.asarray(apply_rope(x[..., order], *factors))[:, rows, 0] for x, rows in calls))
        for order in (np.arange(H), as_stored)
        for calls in [((q_BT1H, 0), (k_BT1H, slice(None)))]
    )
    error_T = np.sqrt(np.mean((wrong - right) ** 2, axis=0) / np.mean(right**2))
    scores.plot(positions, error_T, color=RED)
    scores.set(ylim=(0, None))
    _finish(scores, xlabel="distance in tokens", ylabel="relative error", title="scores with the wrong layout")


def load_other_files() -> None:
    """Adds the drawings of figures_*.py to FIGURES. This file is a script; they import it by the name `figures`."""
    sys.modules["figures"] = sys.modules[__name__]
    for path in sorted(Path(__file__).parent.glob("figures_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


load_other_files()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw() + "\n")
        print(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
