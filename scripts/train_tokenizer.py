"""`minillm train-tokenizer`: trains a tokenizer on any text."""

from minillm_cli.console import run
from minillm_cli.train_tokenizer import main

if __name__ == "__main__":
    run(main, as_script=True)
