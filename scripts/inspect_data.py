"""`minillm inspect-data`: shows what is in a folder of prepared data."""

from minillm_cli.console import run
from minillm_cli.inspect_data import main

if __name__ == "__main__":
    run(main, as_script=True)
