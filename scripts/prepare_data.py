"""`minillm prepare`: trains the tokenizer and writes the token files of a corpus."""

from minillm_cli.console import run
from minillm_cli.prepare import main

if __name__ == "__main__":
    run(main, as_script=True)
