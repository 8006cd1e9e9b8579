"""`minillm convert`: converts a checkpoint between JAX, PyTorch, Hugging Face and GGUF."""

from minillm_cli.console import run
from minillm_cli.convert import main

if __name__ == "__main__":
    run(main, as_script=True)
