"""Loss, perplexity and bits per byte of any checkpoint on a prepared split."""

import math
from typing import Literal

import numpy as np
import tyro
from backends import load_backend

from minillm_core.checkpoints import find_checkpoint, read_info
from minillm_core.cli import run, say
from minillm_core.data import PreparedData
from minillm_core.errors import InputError
from minillm_core.files import hash_file
from minillm_core.metrics import bits_per_byte, perplexity


def main(
    path: tyro.conf.Positional[str] = "runs/quickstart",
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
        split: the prepared split to read.
        data_dir: a folder of prepared data; by default the one the run was trained on.
        seq_len: tokens of a window; each starts without context. By default the run's.
        dtype: of the parameters and the computation.
    """
    framework = load_backend(backend)
    checkpoint = find_checkpoint(path, backend)
    config = read_info(checkpoint).config
    data = PreparedData(data_dir or config.data.dir, config.model.vocab_size)
    own = checkpoint / "tokenizer.model"
    if not own.is_file() or hash_file(data.dir / "tokenizer.model") != hash_file(own):
        raise InputError(
            "the data was prepared with another tokenizer than the model was trained with",
            where=f"{data.dir / 'tokenizer.model'} and {own}",
            do="prepare the data with the run's configuration",
        )
    length = config.train.seq_len if seq_len is None else seq_len
    if not 1 <= length <= config.model.context_length:
        expected = f"1 to {config.model.context_length}, the context"
        raise InputError("seq_len is out of range", expected=expected, found=length)
    generator = framework.Generator(framework.load(checkpoint, dtype), data.tokenizer)
    say(f"evaluating {checkpoint} on {data.dir}, split {split}, {framework.describe_device()}")
    sums, n_scored = [], 0
    for window in data.windows(split, 64, length):
        rows = [tokens[: n + 1] for tokens, n in zip(window.tokens, window.mask.sum(axis=1), strict=True) if n]
        scores = np.concatenate(generator.score(rows))
        sums.append(float(scores.sum(dtype=np.float64)))
        n_scored += len(scores)
    loss = -math.fsum(sums) / n_scored
    print(f"loss {loss:.6f} nats per token")
    print(f"perplexity {perplexity(loss):.4f}")
    print(f"bits_per_byte {bits_per_byte(loss, data.tokens_per_byte(split)):.6f}")


if __name__ == "__main__":
    run(lambda: tyro.cli(main))
