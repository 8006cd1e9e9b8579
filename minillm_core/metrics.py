"""Metrics of a run: metrics.jsonl (one JSON object a line) and loss.png."""

import json
import math
from pathlib import Path
from typing import Any

from minillm_core.errors import InputError


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """Compression of the text itself, comparable between tokenizers; `loss` in nats per token."""
    return loss * tokens_per_byte / math.log(2)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp(710) overflows


class MetricsLog:
    """Appends to metrics.jsonl; on a resumed run, first drops what was logged after the step it resumes from."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= resumed_step] if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)

    def write(self, step: int, split: str, loss: float, **values: float) -> None:
        row = {"step": step, "split": split, "loss": loss, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
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


def plot_loss(metrics_path: Path, picture: Path) -> None:
    """Draws the train and held-out loss of a run, in nats per token, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.3 s to import, needed once a run
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_path)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for split, style in (("train", "-"), ("val", "o-")):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=split)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(picture)
