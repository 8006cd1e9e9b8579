"""Trains a model in JAX, from raw text to a sample of what it has learnt."""

from functools import partial

from minillm_cli.process import set_malloc

if __name__ == "__main__":
    set_malloc()  # may restart the process, so before the slow imports

    from minillm_cli.console import run
    from minillm_cli.train import main_in

    run(partial(main_in, "jax"), as_script=True)
