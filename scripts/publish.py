"""`minillm publish`: evaluates a checkpoint, writes a Hugging Face repository folder, and uploads it."""

from minillm_cli.console import run
from minillm_cli.publish import main

if __name__ == "__main__":
    run(main, as_script=True)
