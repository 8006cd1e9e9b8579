"""`minillm plan`: parameters, operations and memory of a configuration of any size."""

from minillm_cli.console import run
from minillm_cli.plan import main

if __name__ == "__main__":
    run(main, as_script=True)
