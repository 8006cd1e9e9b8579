"""The results: rows, the bounds they are compared with, and their JSON file."""

import json
import statistics
from dataclasses import dataclass, field
from typing import Any

from minillm_cli.benchmark.cases import Bounds, Case, least_seconds, total

FORMAT = "minillm-benchmark"
VERSION = 1


@dataclass
class Row:
    """One engine at one case."""

    case: Case
    engine: str
    seconds: list[float]
    """Of every round."""
    peak_bytes: int
    loss: float | None
    """After all training steps, warm-up included."""

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every round."""
        return [self.case.tokens_per_round / s for s in self.seconds]


@dataclass
class Results:
    """Everything that a run has measured."""

    about: dict[str, Any]
    """Date, command, machine, versions, configuration."""
    references: tuple[str, ...]
    """The engines that all others are compared with."""
    rows: list[Row] = field(default_factory=list)
    bounds: dict[str, Bounds] = field(default_factory=dict)
    """Framework -> the largest rates that it has reached in this run."""
    failed: list[dict[str, str]] = field(default_factory=list)
    """What could not be measured: case, engine, problem."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the measured rows."""
    scaling: dict[str, Any] | None = None
    complete: bool = False

    def see(self, framework: str, flops: float, bandwidth: float) -> None:
        """Raises the bounds of a framework to rates that it has reached."""
        old = self.bounds.get(framework, Bounds(0, 0))
        self.bounds[framework] = Bounds(max(old.flops, flops), max(old.bandwidth, bandwidth))

    def bound(self) -> Bounds:
        """The larger of the frameworks' rates."""
        return Bounds(
            max(bound.flops for bound in self.bounds.values()), max(bound.bandwidth for bound in self.bounds.values())
        )

    def cases(self) -> list[Case]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def of(self, case: Case) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def share(self, row: Row) -> float:
        """The least time of a round, as a share of the median time."""
        return least_seconds(row.case, self.bound())[0] / statistics.median(row.seconds)

    def ratios(self, row: Row) -> dict[str, float]:
        """Reference -> how many times as fast as it a row is, median of the rounds."""
        return {
            other.engine: statistics.median(b / a for a, b in zip(row.seconds, other.seconds, strict=True))
            for other in self.of(row.case)
            if other.engine in self.references
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The content of results.json; docs/performance.md describes it."""
        bound = self.bound() if self.bounds else None
        return {
            "format": FORMAT,
            "version": VERSION,
            "complete": self.complete,
            **self.about,
            "bounds": {name: vars(rates) for name, rates in self.bounds.items()},
            "rows": [self._row(row, bound) for row in self.rows],
            "failed": self.failed,
            "problems": self.problems,
            **({} if self.scaling is None else {"scaling": self.scaling}),
        }

    def _row(self, row: Row, bound: Bounds | None) -> dict[str, Any]:
        cost = total(row.case)
        of_bound: dict[str, Any] = {}
        if bound is not None:
            least, limit = least_seconds(row.case, bound)
            of_bound = {"bound": row.case.tokens_per_round / least, "limit": limit, "share": self.share(row)}
        return {
            "case": row.case.name,
            "work": row.case.work,
            "engine": row.engine,
            "dtype": row.case.dtype,
            "repeats": row.case.repeats,
            "rate": statistics.median(row.rates),
            "rates": row.rates,
            **of_bound,
            "ratios": self.ratios(row),
            "peak_bytes": row.peak_bytes,
            "loss": row.loss,
            "flops": cost.flops / row.case.tokens_per_round,
            "bytes": cost.bytes / row.case.tokens_per_round,
        }
