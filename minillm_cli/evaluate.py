"""Loss, perplexity and bits per byte of any checkpoint on a prepared split."""

from typing import Annotated, Literal

import tyro

from minillm_cli.backends import load_backend
from minillm_cli.console import parse
from minillm_core.interop.evaluation import evaluate_checkpoint
from minillm_core.training.checkpoints import find_checkpoint


def main() -> None:
    parse(evaluate)


def evaluate(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[RUN]")]] = "runs/quickstart",
    backend: Literal["jax", "torch"] = "jax",
    split: Literal["val", "train"] = "val",
    data_dir: str | None = None,
    seq_len: int | None = None,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
) -> None:
    """Evaluates a checkpoint on every token of a split (of conversations: of the assistant's replies).

    Args:
        path: a run, a run's framework folder, or one checkpoint.
        backend: the framework that runs the model.
        split: the prepared split to evaluate.
        data_dir: a folder of prepared data. Default: the data that the run was trained on.
        seq_len: tokens per window; each window starts without context. Default: the run's seq_len.
        dtype: dtype of the parameters and the computation.
    """
    framework = load_backend(backend)
    checkpoint = find_checkpoint(path, backend)
    found = evaluate_checkpoint(checkpoint, framework, split=split, data_dir=data_dir, seq_len=seq_len, dtype=dtype)
    replies = f", over {found.n_targets} tokens of the assistant's replies" if found.is_chat else ""
    print(f"loss {found.loss.mean:.6f} nats per token{replies}")
    print(f"perplexity {found.perplexity:.4f}")
    if found.bits_per_byte is not None:
        print(f"bits_per_byte {found.bits_per_byte:.6f}")
    for name, part in found.loss.parts.items():
        print(f"loss_{name} {part:.6f}")
