"""`minillm serve`: a playground in the browser, and an API."""

from minillm_cli.console import run
from minillm_cli.serve import main

if __name__ == "__main__":
    run(main, as_script=True)
