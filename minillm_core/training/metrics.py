"""Metrics of a run: metrics.jsonl, one JSON object per line."""

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minillm_core.errors import InputError
from minillm_core.files import named_if_it_fails, replace_file

METRICS = "metrics.jsonl"

LARGEST_STEP = 1 << 53
"""Above it, a float64 cannot count."""

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""A line of metrics.jsonl: `step`, `split` (`train` or `val`), `loss` (nats per token; null if not finite), etc."""


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """Bits per byte of the raw text, comparable between tokenizers; `loss` is in nats per token."""
    return loss * tokens_per_byte / math.log(2)


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf


class MetricsLog:
    """metrics.jsonl: rows are appended. A resumed run first drops the rows after the step it resumes from."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.old: Path | None = None
        """New path of an earlier log that was moved away because there is no checkpoint to resume from."""
        if resumed_step == 0 and path.exists() and path.stat().st_size:
            self.old = path.replace(path.with_name(f"{path.name}.old"))
        self.rows = read_metrics(path, resumed_step) if path.exists() else []
        """All rows of the file."""
        write_metrics(path, self.rows)

    def write(self, step: int, split: str, loss: float, **values: float) -> Row:
        """Appends a row and returns it. Numbers that are not finite become null, because JSON cannot represent them."""
        row = {"step": step, "split": split, "loss": loss, **values}
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        with named_if_it_fails(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row

    def has(self, step: int, split: str) -> bool:
        return any((row["step"], row["split"]) == (step, split) for row in self.rows)


def read_metrics(path: Path, last_step: float = math.inf) -> list[Row]:
    """The rows of a metrics.jsonl up to a step. Bad lines that a crash left at the end are skipped, with
    a warning if no step is given.

    Raises:
        InputError: there is a bad line before one of these rows.
    """
    rows: list[Row] = []
    bad = None
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            loss = None if row["loss"] is None else float(row["loss"])
            row = row | {"step": int(row["step"]), "split": str(row["split"]), "loss": loss}
            if not 0 <= row["step"] < LARGEST_STEP:
                raise ValueError("not a step")
        except (ValueError, KeyError, TypeError, OverflowError):
            bad = bad or (number, line[:80])
            continue
        if row["step"] <= last_step:
            if bad:
                hint = "repair or remove that line"
                raise InputError("not a metrics row", found=bad[1], where=f"{path}:{bad[0]}", hint=hint)
            rows.append(row)
    if bad and last_step == math.inf:
        logger.warning(f"{path}: skipping what is after line {bad[0] - 1}, which is not a metrics row: {bad[1]!r}")
    return rows


def write_metrics(path: Path, rows: Iterable[Row]) -> None:
    """Writes a whole metrics.jsonl, atomically."""
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def losses_by_step(rows: Iterable[Row], split: str) -> dict[int, float]:
    """The finite losses of a split, by step."""
    return {row["step"]: row["loss"] for row in rows if row["split"] == split and row["loss"] is not None}
