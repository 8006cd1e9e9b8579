"""`minillm benchmark`: training, prompt processing and decoding, next to peers and to what this machine can do."""

from minillm_cli.benchmark import main
from minillm_cli.console import run

if __name__ == "__main__":
    run(main, as_script=True)
