"""`minillm evaluate`: loss, perplexity and bits per byte on a prepared split."""

from minillm_cli.console import run
from minillm_cli.evaluate import main

if __name__ == "__main__":
    run(main, as_script=True)
