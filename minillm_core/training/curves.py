"""The curves of a run: its logged metrics against steps, tokens, operations or time."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

from minillm_core.config import RUN_RECORD, RunConfig
from minillm_core.errors import InputError
from minillm_core.files import real_path
from minillm_core.model.params import training_flops_per_token
from minillm_core.training.checkpoints import FRAMEWORKS
from minillm_core.training.metrics import METRICS, Row, read_metrics
from minillm_core.training.run_directory import known_hashes, saved_config

logger = logging.getLogger(__name__)

Axis = Literal["step", "tokens", "flops", "time"]

AXIS_LABELS = {"step": "step", "tokens": "tokens", "flops": "training FLOPs", "time": "hours of training"}
FIELD_LABELS = {
    "loss": "loss (nats per token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "bits_per_byte": "bits per byte",
}
LARGEST_VALUE = 1e100
"""Axes cannot show numbers near the limits of float64."""
ROW_KEYS = ("step", "split")
"""What a row is about, in contrast to its metrics."""


@dataclass(frozen=True)
class RunCurves:
    """The log of one run in one framework."""

    folder: Path
    """The framework folder of the run."""
    rows: list[Row]
    config: RunConfig | None
    """None if the log was moved away from its run."""
    hashes: dict[str, str]
    """SHA-256 of the tokenizer and of the tokens of each split; empty if they are not known."""

    @property
    def fields(self) -> set[str]:
        """The metrics that the log has."""
        return {name for row in self.rows for name in row}.difference(ROW_KEYS)

    @property
    def tokens_per_step(self) -> int | None:
        return None if self.config is None else self.config.train.tokens_per_step

    def points(self, field: str, split: str, axis: Axis) -> list[tuple[float, float]]:
        """The values of a metric that can be drawn, (place on the axis, value): NaN and numbers above LARGEST_VALUE are
        left out.

        Raises:
            InputError: the axis needs a configuration or speeds that are missing.
        """
        rows = [row for row in self.rows if row["split"] == split and isinstance(row.get(field), int | float)]
        return [(self._place(row["step"], axis), row[field]) for row in rows if abs(row[field]) < LARGEST_VALUE]

    def _place(self, step: int, axis: Axis) -> float:
        if axis == "step":
            return step
        if self.config is None or self.tokens_per_step is None:
            hint = "use `--x step`, or give a run with its config.yaml"
            problem = f"the {axis} of a step cannot be computed"
            raise InputError(problem, found="no config.yaml", where=self.folder, hint=hint)
        if axis == "tokens":
            return step * self.tokens_per_step
        if axis == "flops":
            return step * self.tokens_per_step * training_flops_per_token(self.config.model, self.config.train.seq_len)
        return self._hours[step]

    @cached_property
    def _hours(self) -> dict[int, float]:
        """Hours of training at each logged step, without evaluations and checkpoints, from the logged speeds. (A
        held-out loss is logged with a train row of its step. After a resume between two rows, the speed of the first
        one stands for all its steps.)"""
        hours, last, found = 0.0, 0, {}
        for row in self.rows:
            if row["split"] == "train":
                speed = row.get("tokens_per_second")
                if not speed:
                    raise InputError("a row has no speed", expected="tokens_per_second", found=row, where=self.folder)
                hours += (row["step"] - last) * (self.tokens_per_step or 0) / speed / 3600
                last = row["step"]
            found[row["step"]] = hours
        return found


def find_curves(places: Sequence[Path]) -> list[RunCurves]:
    """The curves of runs (every framework that has a log), or of framework folders.

    Raises:
        InputError: a place has no log, or a damaged one; or one is given twice.
    """
    folders: dict[Path, Path] = {}
    for place in places:
        inside = [place / name for name in FRAMEWORKS if (place / name / METRICS).is_file()]
        for folder in [place] if (place / METRICS).is_file() else inside:
            if real_path(folder) in folders:
                raise InputError("a run is given twice", found=f"{folders[real_path(folder)]} and {folder}")
            folders[real_path(folder)] = folder
        if not inside and not (place / METRICS).is_file():
            raise InputError(
                "no metrics found",
                expected=f"{METRICS} in it, or in its folders {' and '.join(FRAMEWORKS)}",
                found="no such folder" if not place.is_dir() else "none",
                where=place,
                hint="give a run, such as runs/a, or one of its folders, such as runs/a/jax",
            )
    return [read_curves(folder) for folder in folders.values()]


def read_curves(folder: Path) -> RunCurves:
    """The curves of one framework folder.

    Raises:
        InputError: it has no log, or a damaged one; or config.yaml or run.json of the run is damaged.
    """
    path, run = folder / METRICS, real_path(folder).parent
    if not path.is_file():
        hint = "give two framework folders, such as runs/a/jax and runs/b/torch; or train this run in both"
        raise InputError("no metrics found", expected=METRICS, where=folder, hint=hint)
    rows = read_metrics(path)
    if not rows:
        raise InputError("the log is empty", expected="one JSON object on each line", where=path)
    for split in {row["split"] for row in rows}:
        steps = [row["step"] for row in rows if row["split"] == split]
        if any(later <= step for step, later in pairwise(steps)):
            logger.warning(f"{path}: the steps of {split} do not ascend: the curve goes back")
    return RunCurves(folder, rows, saved_config(run), known_hashes(run / RUN_RECORD) or {})


def why_not_comparable(runs: Sequence[RunCurves], fields: Sequence[str], axis: Axis) -> list[str]:
    """What makes the curves of several runs hard to compare, in sentences for the user."""
    reasons = []
    known = [run.hashes for run in runs if run.hashes]
    per_token = any(field in ("loss", "perplexity") or field.startswith("loss_") for field in fields)
    if per_token and len({hashes.get("tokenizer") for hashes in known}) > 1:
        reasons.append("the runs have different tokenizers: losses per token cannot be compared, bits per byte can")
    held_out = [{name: value for name, value in hashes.items() if name.startswith("val")} for hashes in known]
    lengths = {run.config.train.seq_len for run in runs if run.config is not None}
    if per_token or "bits_per_byte" in fields:
        if any(hashes != held_out[0] for hashes in held_out) and len({h.get("tokenizer") for h in known}) == 1:
            reasons.append("the runs have different held-out texts: their held-out losses cannot be compared")
        if len(lengths) > 1:
            reasons.append(f"the runs have windows of different lengths (seq_len {sorted(lengths)}): longer ones help")
    per_step = {str(run.folder): run.tokens_per_step for run in runs if run.tokens_per_step is not None}
    if axis == "step" and len({*per_step.values()}) > 1:
        sizes = ", ".join(f"{name}: {n:,}" for name, n in per_step.items())
        reasons.append(f"a step has a different number of tokens in each run ({sizes}); use `--x tokens`")
    return reasons
