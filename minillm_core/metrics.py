"""Metrics of a run: metrics.jsonl (one JSON object a line), pictures of them, and what the device could do at best."""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm_core.errors import InputError
from minillm_core.files import replace_file

Row = dict[str, Any]
"""A line of metrics.jsonl: `step`, `split` (`train` or `val`), `loss` (nats per token; null if not finite), others."""


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """Compression of the text itself, comparable between tokenizers; `loss` in nats per token."""
    return loss * tokens_per_byte / math.log(2)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp(710) overflows


class MetricsLog:
    """metrics.jsonl: rows are appended; a resumed run first drops those after the step it resumes from."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read_metrics(path) if row["step"] <= resumed_step] if path.exists() else []
        """All rows, as in the file."""
        write_metrics(path, self.rows)

    def write(self, step: int, split: str, loss: float, **values: float) -> Row:
        """Appends a row and returns it; numbers that are not finite, which JSON does not have, become null."""
        row = {"step": step, "split": split, "loss": loss, **values}
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row

    def held_out(self) -> dict[int, float]:
        """Held-out loss by step."""
        return _losses(self.rows, "val")


def read_metrics(path: Path) -> list[Row]:
    """Rows of a metrics.jsonl; a last line cut short by a crash is left out.

    Raises:
        InputError: another line is not a metrics row.
    """
    rows = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            rows.append({"step": row["step"], "split": row["split"], "loss": row["loss"], **row})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError("not a line of metrics", found=line[:80], where=f"{path}:{number}") from error
    return rows


def write_metrics(path: Path, rows: Iterable[Row]) -> None:
    """Writes a metrics.jsonl whole."""
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))


PEAK_FLOPS = {
    "GB200": {"bfloat16": 2500e12},
    "B200": {"bfloat16": 2250e12},
    "H200": {"bfloat16": 989e12, "float32": 67e12},
    "H100 PCIe": {"bfloat16": 756e12, "float32": 51e12},
    "H100": {"bfloat16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float32": 91.6e12},
    "A10": {"bfloat16": 125e12, "float32": 31.2e12},
    "RTX 4090": {"bfloat16": 165e12, "float32": 82.6e12},
}
"""Dense peak of a GPU, in FLOP/s, by a part of its name and the dtype of the products; from NVIDIA's data sheets."""


def peak_flops(device: str, dtype: str) -> float | None:
    """Peak of a device by its name, or None where it is not known; the table's first match counts."""
    return next((peaks.get(dtype) for name, peaks in PEAK_FLOPS.items() if name in device), None)


def plot_loss(rows: Sequence[Row], picture: Path) -> None:
    """Draws the train and held-out loss of a run, in nats per token, as a PNG."""
    from matplotlib.figure import Figure  # 0.3 s to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for split, style in (("train", "-"), ("val", "o-")):
        if points := _losses(rows, split):
            axes.plot(list(points), list(points.values()), style, markersize=3, linewidth=1, label=split)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    _save(figure, picture)


def plot_two_losses(runs: Mapping[str, Sequence[Row]], picture: Path) -> dict[str, dict[int, float]]:
    """Draws the losses of two runs, and below them how far they are apart, as a PNG.

    Args:
        runs: the rows of each, by the name to show.

    Returns:
        by split, the absolute difference at every step that both have.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    differences = {}
    for split, color in (("train", "C0"), ("val", "C1")):
        (name, points), (other_name, other_points) = ((name, _losses(rows, split)) for name, rows in runs.items())
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


def _losses(rows: Sequence[Row], split: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows if row["split"] == split and row["loss"] is not None}


def _save(figure: Any, picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    replace_file(picture, content.getvalue())
