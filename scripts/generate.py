"""Continues a prompt, from any checkpoint of either framework. The text goes to stdout as it comes."""

from typing import Literal

import tyro
from backends import load_backend

from minillm_core.checkpoints import find_checkpoint
from minillm_core.cli import print_stream, run
from minillm_core.tokenizer import Tokenizer


def generate(
    path: tyro.conf.Positional[str] = "runs/quickstart",
    backend: Literal["jax", "torch"] = "jax",
    prompt: str = "The state of the Union is",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
) -> None:
    """Continues a prompt until the end of the document or max_new_tokens. The same seed draws the same
    numbers in both frameworks.

    Args:
        path: a run, a run's framework folder, or one checkpoint.
        backend: the framework that runs the model.
        prompt: the text to continue.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the most likely token; 1 leaves the distribution as it is.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens that together have at least this probability.
        seed: of the sampling.
        dtype: of the parameters and the computation.
    """
    framework = load_backend(backend)
    checkpoint = find_checkpoint(path, backend)
    generator = framework.Generator(framework.load(checkpoint, dtype), Tokenizer(checkpoint / "tokenizer.model"))
    pieces = generator.stream(
        prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    print_stream(prompt, pieces)


if __name__ == "__main__":
    run(lambda: tyro.cli(generate))
