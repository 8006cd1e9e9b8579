"""`minillm generate`: continues a prompt, or every prompt of a file."""

from minillm_cli.console import run
from minillm_cli.generate import main

if __name__ == "__main__":
    run(main, as_script=True)
