"""How cost grows: the time of a train step with length, batch, depth and width; of a new token with the context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minillm_cli.benchmark.cases import Case, least_seconds, train_case
from minillm_cli.benchmark.measure import measure_bounds
from minillm_cli.benchmark.results import Results
from minillm_cli.benchmark.team import Engine, team
from minillm_core.config import ComputeDtype, ModelConfig, RunConfig

FACTORS = (0.25, 0.5, 1, 2)
ENGINES = ("jax", "torch")
ROUNDS = 4
NEW_TOKENS = 64


@dataclass(frozen=True)
class Sizes:
    """The model and batch around which each size is varied."""

    width: int
    head_dim: int
    layers: int
    vocab: int
    tokens: int
    rows: int
    context: int
    """Tokens before the new ones, in the sweep of decoding."""
    decode_rows: int


SIZES = {
    False: Sizes(width=256, head_dim=32, layers=4, vocab=2048, tokens=256, rows=4, context=1024, decode_rows=4),
    True: Sizes(width=1024, head_dim=64, layers=8, vocab=32_000, tokens=1024, rows=8, context=4096, decode_rows=16),
}
"""For a CPU with few cores, and for a GPU."""


@dataclass(frozen=True)
class Sweep:
    """One thing that grows."""

    name: str
    per: str
    """What the time is of: a step, or a token."""
    points: list[tuple[int, Case]]


def sweeps(config: RunConfig, dtype: ComputeDtype, *, on_gpu: bool) -> list[Sweep]:
    """Four sizes each of T, batch, depth, width and context. Only the optimizer's settings come from `config`."""
    base = SIZES[on_gpu]

    def train(**changed: int) -> Case:
        sizes = replace(base, **changed)
        model = _model(sizes, max(sizes.tokens, 2))
        one = replace(config, model=model, train=replace(config.train, seq_len=1, batch_size=1, grad_accum=1))
        return train_case(one, dtype, sizes.rows, sizes.tokens, 1, 1)

    def grown(name: str) -> list[int]:
        return [int(factor * getattr(base, name)) for factor in FACTORS]

    labels = {"tokens": "tokens of a sequence", "rows": "sequences of a batch", "layers": "layers", "width": "width"}
    found = []
    for name, label in labels.items():
        found.append(Sweep(label, "train step", [(x, train(**{name: x})) for x in grown(name)]))
    model = replace(config, model=_model(base, 4 * base.context), train=replace(config.train, seq_len=1))
    lengths = [(x, Case("continue", model, dtype, base.decode_rows, x, NEW_TOKENS)) for x in grown("context")]
    return [*found, Sweep(f"context of {base.decode_rows} rows", "new token of all rows", lengths)]


def _model(sizes: Sizes, context: int) -> ModelConfig:
    heads = max(1, sizes.width // sizes.head_dim)
    return ModelConfig(
        vocab_size=sizes.vocab,
        context_length=context,
        width=sizes.width,
        n_layers=sizes.layers,
        n_heads=heads,
        n_kv_heads=heads,
        hidden=4 * sizes.width,
        head_dim=sizes.head_dim,
    )


def measure_scaling(
    wanted: Sequence[Sweep], names: Sequence[str], results: Results, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Times every point of the sweeps. For results.json."""
    names = [name for name in names if name in ENGINES]
    times: list[dict[str, list[float]]] = []
    for work in ("train", "decode"):
        with team(names, work) as engines:
            for sweep in (sweep for sweep in wanted if (sweep.points[0][1].work == "train") == (work == "train")):
                tell(f"scaling with {sweep.name}: {', '.join(str(x) for x, _ in sweep.points)}")
                times.append(_fastest(sweep, engines))
            measure_bounds(wanted[0].points[0][1].dtype, engines, results)
    found = []
    for sweep, measured in zip(wanted, times, strict=True):
        xs = [x for x, _ in sweep.points]
        least = [least_seconds(case, results.bound())[0] / case.repeats for _, case in sweep.points]
        engines_found = {name: {"seconds": t, "slope": slope(xs, t)} for name, t in measured.items()}
        expected = {"seconds": least, "slope": slope(xs, least)}
        found.append({"name": sweep.name, "per": sweep.per, "x": xs, "expected": expected, "engines": engines_found})
    return {"sweeps": found}


def _fastest(sweep: Sweep, engines: dict[str, Engine]) -> dict[str, list[float]]:
    """Engine -> seconds of its fastest round at each point. All points and engines take turns, so that a slow moment of
    the machine affects all of them."""
    for engine in engines.values():
        engine.ask("forget")
        for _, case in sweep.points:
            engine.ask("prepare", case=case.to_json())
    fastest = {name: [float("inf")] * len(sweep.points) for name in engines}
    for _ in range(ROUNDS):
        for i, (_, case) in enumerate(sweep.points):
            for name, engine in engines.items():
                fastest[name][i] = min(fastest[name][i], engine.ask("run", which=i)["seconds"] / case.repeats)
    return fastest


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent p of the power law x^p that fits best: 1 means that twice the size takes twice the time."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])
