"""`minillm parity`: compares two checkpoints stage by stage."""

from minillm_cli.console import run
from minillm_cli.parity import main

if __name__ == "__main__":
    run(main, as_script=True)
