"""Trains a model in JAX, from raw text to a sample of what it has learnt."""

from backends import load_backend

from minillm_core.cli import parse_run_config, run
from minillm_core.config import RunConfig
from minillm_core.loop import train_and_sample


def main() -> None:
    train_and_sample(parse_run_config(__doc__, RunConfig), load_backend("jax"))


if __name__ == "__main__":
    run(main)
