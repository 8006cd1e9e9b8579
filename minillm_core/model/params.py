"""The table of parameters (canonical name -> shape, logical axes, initial distribution), and the initial weights.

Canonical names and (out, in) shapes are those of a Hugging Face Llama checkpoint.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError, listed
from minillm_core.progress import progress
from minillm_core.tensors import Tensors, counted


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: canonical name, shape, the meaning of its axes, and its initial distribution."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None
    """Standard deviation of the initial normal distribution. None: all ones (norm scales)."""

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices only."""
        return len(self.shape) > 1


def param_table(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of a model, by canonical name, in order."""
    D, F, V = config.width, config.hidden, config.vocab_size
    Q, KV = config.n_heads * config.resolved_head_dim, config.n_kv_heads * config.resolved_head_dim
    std = config.init_std
    residual_std = std / math.sqrt(2 * config.n_layers)

    rows: list[tuple[str, tuple[int, ...], tuple[str, ...], float | None]] = []
    rows.append(("model.embed_tokens.weight", (V, D), ("vocab", "width"), std))
    for layer in range(config.n_layers):
        block = f"model.layers.{layer}"
        rows += [
            (f"{block}.input_layernorm.weight", (D,), ("width",), None),
            (f"{block}.self_attn.q_proj.weight", (Q, D), ("heads", "width"), std),
            (f"{block}.self_attn.k_proj.weight", (KV, D), ("kv_heads", "width"), std),
            (f"{block}.self_attn.v_proj.weight", (KV, D), ("kv_heads", "width"), std),
            (f"{block}.self_attn.o_proj.weight", (D, Q), ("width", "heads"), residual_std),
            (f"{block}.post_attention_layernorm.weight", (D,), ("width",), None),
            (f"{block}.mlp.gate_proj.weight", (F, D), ("hidden", "width"), std),
            (f"{block}.mlp.up_proj.weight", (F, D), ("hidden", "width"), std),
            (f"{block}.mlp.down_proj.weight", (D, F), ("width", "hidden"), residual_std),
        ]
    rows.append(("model.norm.weight", (D,), ("width",), None))
    if not config.tie_embeddings:
        rows.append(("lm_head.weight", (V, D), ("vocab", "width"), std))
    return {row[0]: ParamSpec(*row) for row in rows}


def count_params(config: ModelConfig) -> int:
    return sum(math.prod(spec.shape) for spec in param_table(config).values())


def read_weights(config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]]) -> Tensors:
    """The weights of a model, from an iterator that reads them one at a time."""
    with progress("reading the weights", count_params(config), "value") as work:
        return counted(tensors, work)


def forward_flops(config: ModelConfig, batch: int, seq_len: int) -> int:
    """Floating-point operations of the matrix products in one forward pass without a cache (a multiply-add counts 2).

    Attention counts all seq_len x seq_len pairs, including the masked half. A training step costs 3 times as much.
    """
    matrices = sum(math.prod(spec.shape) for spec in param_table(config).values() if spec.decays)
    if not config.tie_embeddings:
        matrices -= config.vocab_size * config.width  # the embedding is then only a table lookup
    attention = 2 * config.n_layers * config.n_heads * config.resolved_head_dim * seq_len
    return 2 * batch * seq_len * (matrices + attention)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of training one token, forward and backward: 3 times those of a forward pass."""
    return 3 * forward_flops(config, 1, seq_len) / seq_len


def init_param(spec: ParamSpec, seed: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Initial values of rows start:stop of one parameter, float32.

    Any slice of rows equals the same slice of the whole tensor, so each shard can draw its own part: normal numbers
    come in blocks of four (Box-Muller) from a Philox counter whose key is derived from (seed, name).
    """
    stop = spec.shape[0] if stop is None else stop
    shape = (stop - start, *spec.shape[1:])
    if spec.std is None:
        return np.ones(shape, np.float32)
    row_size = math.prod(spec.shape[1:])
    first, last = start * row_size, stop * row_size
    first_block, last_block = first // 4, -(-last // 4)
    key = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little")).advance(first_block)
    words = bits.random_raw(4 * (last_block - first_block)).reshape(-1, 2, 2)
    uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1), excluding both ends
    radius = np.sqrt(-2 * np.log(uniform[:, 0]))
    angle = 2 * np.pi * uniform[:, 1]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    offset = first - 4 * first_block
    return (spec.std * normal[offset : offset + last - first]).astype(np.float32).reshape(shape)


def init_params(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """The initial weights of a model, float32, by canonical name. Both frameworks start from exactly these values."""
    return {name: init_param(spec, seed) for name, spec in param_table(config).items()}


def check_shapes(config: ModelConfig, shapes: Mapping[str, Iterable[int]], where: object) -> None:
    """Compares the names and shapes of tensors with the table of parameters.

    Raises:
        InputError: tensors are missing, unexpected or have the wrong shape. One message lists them all.
    """
    table = param_table(config)
    problems = [f"missing: {name} {spec.shape}" for name, spec in table.items() if name not in shapes]
    for name, shape in shapes.items():
        if name not in table:
            problems.append(f"unexpected: {name} {tuple(shape)}")
        elif tuple(shape) != table[name].shape:
            problems.append(f"shape: {name}: expected {table[name].shape}, found {tuple(shape)}")
    if problems:
        hint = "use the configuration that this checkpoint was written with"
        first = next(iter(table))
        prefix = next((name.removesuffix(first) for name in shapes if name.endswith(first)), "")
        if prefix and all(name.startswith(prefix) for name in shapes):
            hint = f"every name begins with {prefix!r}, the prefix of a wrapper: save the model inside the wrapper"
        elif not any(problem.startswith("shape") for problem in problems):
            hint = "use a checkpoint that has exactly the tensors of the model"
        raise InputError(listed(f"{len(problems)} tensor(s) do not fit the model", problems), where=where, hint=hint)
