"""`minillm chat`: a conversation with a model in the terminal."""

from minillm_cli.chat import main
from minillm_cli.console import run

if __name__ == "__main__":
    run(main, as_script=True)
