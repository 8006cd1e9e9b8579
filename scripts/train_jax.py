"""Trains a model in JAX, from raw text to a sample of what it has learnt."""

from functools import partial

from minillm_cli.console import run
from minillm_cli.train import main_in

if __name__ == "__main__":
    run(partial(main_in, "jax"), as_script=True)
