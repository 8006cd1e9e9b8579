"""The curves of a run: its logged metrics against steps, tokens, operations or time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from minillm_core.config import RUN_RECORD, RunConfig, load_config
from minillm_core.errors import InputError
from minillm_core.files import real_path
from minillm_core.model.params import forward_flops
from minillm_core.training.checkpoints import FRAMEWORKS
from minillm_core.training.metrics import METRICS, Row, read_metrics
from minillm_core.training.run_directory import CONFIG

Axis = Literal["step", "tokens", "flops", "time"]

AXIS_LABELS = {"step": "step", "tokens": "tokens", "flops": "training FLOPs", "time": "hours of training"}
FIELD_LABELS = {
    "loss": "loss (nats per token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "bits_per_byte": "bits per byte",
}
NO_FIELDS = ("step", "split")


@dataclass(frozen=True)
class RunCurves:
    """The log of one run in one framework."""

    folder: Path
    """The framework folder of the run."""
    rows: list[Row]
    config: RunConfig | None
    """None if the log was moved away from its run."""
    tokenizer: str | None
    """SHA-256 of the tokenizer; None if it is not known."""

    @property
    def fields(self) -> set[str]:
        """The metrics that the log has."""
        return {name for row in self.rows for name in row}.difference(NO_FIELDS)

    @property
    def tokens_per_step(self) -> int | None:
        return None if self.config is None else self.config.train.batch_size * self.config.train.seq_len

    def points(self, field: str, split: str, axis: Axis) -> list[tuple[float, float]]:
        """The finite values of a metric, (place on the axis, value).

        Raises:
            InputError: the axis needs a configuration or speeds that are missing.
        """
        rows = [row for row in self.rows if row["split"] == split and row.get(field) is not None]
        return [(self._place(row["step"], axis), float(row[field])) for row in rows]

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
            T = self.config.train.seq_len
            return step * self.tokens_per_step * 3 * forward_flops(self.config.model, 1, T) / T
        return self._hours[step]

    @cached_property
    def _hours(self) -> dict[int, float]:
        """Hours of training at each logged step, without evaluations and checkpoints, from the logged speeds."""
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
        InputError: it has no log, or a damaged one.
    """
    path, run = folder / METRICS, real_path(folder).parent
    if not path.is_file():
        hint = "give two framework folders, such as runs/a/jax and runs/b/torch; or train this run in both"
        raise InputError("no metrics found", expected=METRICS, where=folder, hint=hint)
    rows = read_metrics(path)
    if not rows:
        raise InputError("the log is empty", expected="one JSON object on each line", where=path)
    config = load_config(str(run / CONFIG)) if (run / CONFIG).is_file() else None
    return RunCurves(folder, rows, config, _tokenizer_of(run / RUN_RECORD))


def _tokenizer_of(record: Path) -> str | None:
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["data_hashes"]["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def why_not_comparable(runs: Sequence[RunCurves], fields: Sequence[str], axis: Axis) -> list[str]:
    """What makes the curves of several runs hard to compare, in sentences for the user."""
    reasons = []
    tokenizers = {run.tokenizer for run in runs if run.tokenizer is not None}
    if len(tokenizers) > 1 and any(field in ("loss", "perplexity") for field in fields):
        reasons.append(
            "the runs have different tokenizers, so losses per token cannot be compared; `--y bits_per_byte` can"
        )
    per_step = {str(run.folder): run.tokens_per_step for run in runs if run.tokens_per_step is not None}
    if axis == "step" and len({*per_step.values()}) > 1:
        sizes = ", ".join(f"{name}: {n:,}" for name, n in per_step.items())
        reasons.append(f"a step has a different number of tokens in each run ({sizes}); use `--x tokens`")
    return reasons
