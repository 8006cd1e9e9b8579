"""Loss, perplexity and bits per byte of any checkpoint on a prepared split."""

from dataclasses import replace
from typing import Literal

import tyro
from backends import load_backend

from minillm_core.checkpoints import find_checkpoint, read_info
from minillm_core.cli import run, say
from minillm_core.data import PreparedData
from minillm_core.errors import InputError
from minillm_core.files import hash_file
from minillm_core.loop import evaluate
from minillm_core.metrics import bits_per_byte, perplexity


def main(
    path: tyro.conf.Positional[str] = "runs/quickstart",
    backend: Literal["jax", "torch"] = "jax",
    split: Literal["val", "train"] = "val",
    data_dir: str | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
) -> None:
    """Evaluates a checkpoint on every token of a split.

    Args:
        path: a run, a run's framework folder, or one checkpoint.
        backend: the framework that runs the model.
        split: the prepared split to read.
        data_dir: a folder of prepared data; by default the one the run was trained on.
        batch_size: windows at a time; by default the run's micro-batch.
        seq_len: tokens of a window; each starts without context. By default the run's.
        dtype: of the parameters and the computation.
    """
    framework = load_backend(backend)
    checkpoint = find_checkpoint(path, backend)
    config = read_info(checkpoint).config
    data = PreparedData(data_dir or config.data.dir, config.model.vocab_size)
    if hash_file(data.dir / "tokenizer.model") != hash_file(checkpoint / "tokenizer.model"):
        raise InputError(
            "the data was prepared with another tokenizer than the model was trained with",
            where=f"{data.dir / 'tokenizer.model'} and {checkpoint / 'tokenizer.model'}",
            do="prepare the data with the run's configuration",
        )
    rows = config.train.batch_size // config.train.grad_accum if batch_size is None else batch_size
    length = config.train.seq_len if seq_len is None else seq_len
    train = replace(config, train=replace(config.train, batch_size=rows, grad_accum=1, seq_len=length)).train
    say(f"evaluating {checkpoint} on {data.dir}, split {split}, {framework.describe_device()}")
    loss = evaluate(framework.make_eval_step(framework.load(checkpoint, dtype)), data, split, train)
    print(f"loss {loss:.6f} nats per token")
    print(f"perplexity {perplexity(loss):.4f}")
    print(f"bits_per_byte {bits_per_byte(loss, data.tokens_per_byte(split)):.6f}")


if __name__ == "__main__":
    run(lambda: tyro.cli(main))
