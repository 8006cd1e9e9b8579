"""Loss, perplexity and bits per byte of any checkpoint on a prepared split."""

from dataclasses import replace
from typing import Annotated, Literal

import tyro

from minillm_cli.backends import load_backend
from minillm_cli.console import parse, say
from minillm_core.data.mixture import Mixture
from minillm_core.data.run_data import open_data
from minillm_core.decoding.scoring import score_split
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.checkpoints import find_checkpoint, read_info
from minillm_core.training.metrics import bits_per_byte, perplexity


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
    """Evaluates a checkpoint on every token of a split.

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
    config = read_info(checkpoint).config
    given = None if data_dir is None else replace(config.data, dir=data_dir, mixture=None, mixture_changes=None)
    data = open_data(given or config.data, config.model.vocab_size)
    length = config.train.seq_len if seq_len is None else seq_len
    tokenizer = load_tokenizer(checkpoint, config.model.vocab_size)
    generator = framework.Generator(framework.load(checkpoint, dtype), tokenizer)
    where = ", ".join(str(part.dir) for part in data.parts.values()) if isinstance(data, Mixture) else data.dir
    say(f"evaluating {checkpoint} on {where}, split {split}, {framework.describe_device()}")
    found = score_split(generator, data, split, length)
    loss = found.mean
    print(f"loss {loss:.6f} nats per token")
    print(f"perplexity {perplexity(loss):.4f}")
    if (per_byte := data.tokens_per_byte(split)) is not None:
        print(f"bits_per_byte {bits_per_byte(loss, per_byte):.6f}")
    for name, part in found.parts.items():
        print(f"loss_{name} {part:.6f}")
