"""How cost grows: the time of a train step with length, batch, depth and width; of a new token with the context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minillm_cli.benchmark.cases import Case, least_seconds, train_case
from minillm_cli.benchmark.measure import measure_bounds
from minillm_cli.benchmark.results import Results
from minillm_cli.benchmark.team import team
from minillm_core.config import ComputeDtype, ModelConfig, RunConfig

FACTORS = (0.25, 0.5, 1, 2)
ENGINES = ("jax", "torch")
ROUNDS = 3
NEW_TOKENS = 128


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
    False: Sizes(width=256, head_dim=32, layers=4, vocab=2048, tokens=512, rows=4, context=1024, decode_rows=8),
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
    """Times every point of the sweeps, the engines in turn; the fastest round counts. For results.json."""
    names = [name for name in names if name in ENGINES]
    times: dict[tuple[str, Case], float] = {}
    for work, case_work in (("train", "train"), ("decode", "continue")):
        cases = dict.fromkeys(case for sweep in wanted for _, case in sweep.points if case.work == case_work)
        with team(names, work) as engines:
            for i, case in enumerate(cases):
                tell(f"scaling: {case.name} ({i + 1} of {len(cases)}), {case.config.model.n_layers} layers")
                for engine in engines.values():
                    engine.ask("prepare", case=case.to_json())
                rounds = [{name: e.ask("run")["seconds"] for name, e in engines.items()} for _ in range(ROUNDS)]
                for name in engines:
                    times[name, case] = min(seconds[name] for seconds in rounds) / case.repeats
            measure_bounds(next(iter(cases)).dtype, engines, results)
    found = []
    for sweep in wanted:
        xs = [x for x, _ in sweep.points]
        least = [least_seconds(case, results.bound())[0] / case.repeats for _, case in sweep.points]
        measured = {name: [times[name, case] for _, case in sweep.points] for name in names}
        engines_found = {name: {"seconds": t, "slope": slope(xs, t)} for name, t in measured.items()}
        expected = {"seconds": least, "slope": slope(xs, least)}
        found.append({"name": sweep.name, "per": sweep.per, "x": xs, "expected": expected, "engines": engines_found})
    return {"sweeps": found}


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent p of the power law x^p that fits best: 1 means that twice the size takes twice the time."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])
