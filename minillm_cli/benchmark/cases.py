"""What is measured: one work at one size, and the least that it costs in operations and bytes."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from minillm_core.config import ComputeDtype, ModelConfig, RunConfig, run_config_from_dict
from minillm_core.model.params import count_params, forward_flops, param_table

WORKS = ("train", "prefill", "decode")
BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by dtype."""
ADAMW_BYTES = 7 * 4
"""AdamW reads a parameter, its gradient and two moments and writes all but the gradient, in float32."""


@dataclass(frozen=True)
class Case:
    """One work at one size. Its weights and tokens are random."""

    work: str
    """`train`, `prefill`, `decode` or, in scaling.py, `continue`: all rows continue one long prefix."""
    config: RunConfig
    """The model and, for training, the optimizer, the batch, its length and the micro-batches."""
    dtype: str
    rows: int
    """Sequences per step, or prompts that are continued together."""
    length: int
    """Tokens of a sequence or of a prompt. Several prompts have lengths from a quarter to the double of it."""
    repeats: int = 1
    """Training steps per round, or new tokens of every row."""

    @property
    def name(self) -> str:
        if self.work == "train":
            micro = f" in {self.config.train.grad_accum} micro-batches" if self.config.train.grad_accum > 1 else ""
            return f"train, {self.rows} x {self.length}{micro}"
        if self.work == "prefill":
            return f"prefill, {self.rows} x {self.length}"
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{self.work}, {rows}, {self.repeats} after {self.length}"

    @property
    def tokens_per_round(self) -> int:
        """What a rate counts: trained, processed or new tokens."""
        return self.rows * (self.length * self.repeats if self.work in ("train", "prefill") else self.repeats)

    def batch_rows(self) -> np.ndarray:
        """Random tokens (rows, length + 1), int32."""
        shape = (self.rows, self.length + 1)
        return np.random.default_rng(0).integers(0, self.config.model.vocab_size, shape).astype(np.int32)

    def prompts(self) -> list[list[int]]:
        """Random prompts."""
        rng = np.random.default_rng(0)
        return [rng.integers(4, self.config.model.vocab_size, n).tolist() for n in self.lengths()]

    def lengths(self) -> list[int]:
        """The lengths of the prompts."""
        if self.work != "decode" or self.rows == 1:
            return [self.length] * self.rows
        ragged = np.linspace(max(1, self.length // 4), 2 * self.length, self.rows).astype(int)
        return [int(n) for n in ragged]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Case":
        return cls(**{**data, "config": run_config_from_dict(data["config"], "of the benchmark")})


@dataclass(frozen=True)
class Cost:
    """Operations of matrix products, and the least number of bytes that must move between memory and processor."""

    flops: float
    bytes: float

    def seconds(self, bounds: "Bounds") -> float:
        """The least time: what takes longer, computing or moving."""
        return max(self.flops / bounds.flops, self.bytes / bounds.bandwidth)

    def times(self, n: float) -> "Cost":
        return Cost(n * self.flops, n * self.bytes)


@dataclass(frozen=True)
class Bounds:
    """The largest rates that were measured on this device."""

    flops: float
    """FLOP/s of a large matrix product in the dtype of the case."""
    bandwidth: float
    """Bytes per second of reading and writing large arrays."""


def phases(case: Case) -> list[Cost]:
    """The cost of one round, in parts that cannot overlap: each has its own least time."""
    model, size = case.config.model, BYTES[case.dtype]
    if case.work == "train":
        return [_train_step(case).times(case.repeats)]
    if case.work == "continue":
        return [decode_step(model, case.rows, case.length + case.repeats / 2, size).times(case.repeats)]
    prefill = _prefill(model, case.lengths(), size)
    if case.work == "prefill":
        return [prefill]
    mean = sum(case.lengths()) / case.rows + case.repeats / 2
    return [prefill, decode_step(model, case.rows, mean, size).times(case.repeats)]


def least_seconds(case: Case, bounds: Bounds) -> tuple[float, str]:
    """The least time of one round, and what it is spent on: `compute` or `memory`."""
    parts = phases(case)
    compute, memory = (sum(part.flops for part in parts) / bounds.flops, sum(p.bytes for p in parts) / bounds.bandwidth)
    return sum(part.seconds(bounds) for part in parts), "compute" if compute >= memory else "memory"


def total(case: Case) -> Cost:
    """The cost of one round."""
    parts = phases(case)
    return Cost(sum(part.flops for part in parts), sum(part.bytes for part in parts))


def matrix_params(model: ModelConfig) -> int:
    """Parameters that every token is multiplied by: all matrices, but of embedding and output head only one."""
    n = sum(math.prod(spec.shape) for spec in param_table(model).values() if spec.decays)
    return n if model.tie_embeddings else n - model.vocab_size * model.width


def decode_step(model: ModelConfig, rows: int, context: float, size: int) -> Cost:
    """One new token of every row after `context` tokens: every weight and every cached key and value is read once."""
    heads = model.n_heads * model.resolved_head_dim
    flops = 2 * rows * (matrix_params(model) + 2 * model.n_layers * heads * context)
    return Cost(flops, size * (matrix_params(model) + rows * context * _cached(model)))


def _prefill(model: ModelConfig, lengths: list[int], size: int) -> Cost:
    """The output head is computed for the last token of every row only; keys and values are written."""
    head = 2 * model.vocab_size * model.width
    flops = sum(forward_flops(model, 1, n) - head * (n - 1) for n in lengths)
    return Cost(flops, size * (matrix_params(model) + sum(lengths) * _cached(model)))


def _train_step(case: Case) -> Cost:
    """Weights are read forward and backward in every micro-batch. Activations are not counted: they may stay in the
    caches of the processor."""
    model, n_micro = case.config.model, case.config.train.grad_accum
    moved = count_params(model) * (n_micro * (2 * BYTES[case.dtype] + 4) + ADAMW_BYTES)
    return Cost(3 * forward_flops(model, case.rows, case.length), moved)


def _cached(model: ModelConfig) -> int:
    """Numbers in the cache of one token."""
    return 2 * model.n_layers * model.n_kv_heads * model.resolved_head_dim


def train_case(config: RunConfig, dtype: ComputeDtype, rows: int, length: int, grad_accum: int, steps: int) -> Case:
    """Raises InputError if the sizes do not fit the model."""
    train = replace(config.train, batch_size=rows, seq_len=length, grad_accum=grad_accum, compute_dtype=dtype)
    return Case("train", replace(config, train=train), dtype, rows, length, steps)
