"""`minillm plot`: draws loss, learning rate, gradient norm and speed of runs."""

from minillm_cli.console import run
from minillm_cli.plot import main

if __name__ == "__main__":
    run(main, as_script=True)
