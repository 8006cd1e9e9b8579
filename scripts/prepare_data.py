"""`minillm prepare`: encodes text for training."""

from minillm_cli.console import run
from minillm_cli.prepare import main

if __name__ == "__main__":
    run(main, as_script=True)
