"""`minillm COMMAND [ARGUMENTS]`: the entry point of every command."""

import difflib
import importlib
import sys

from minillm_cli.console import run
from minillm_cli.process import set_malloc
from minillm_core.errors import InputError
from minillm_core.version import __version__

COMMANDS = {
    "train": ("train", "train a model, from raw text to a sample of what it has learnt"),
    "train-tokenizer": ("train_tokenizer", "train a tokenizer on any text"),
    "prepare": ("prepare", "encode text for training: the corpus of a configuration, or any files"),
    "inspect-data": ("inspect_data", "show what is in a folder of prepared data"),
    "generate": ("generate", "continue a prompt, or every prompt of a file"),
    "chat": ("chat", "talk with a model in the terminal, in its own chat format"),
    "serve": ("serve", "a playground in the browser, and OpenAI's API"),
    "evaluate": ("evaluate", "print loss, perplexity and bits per byte on a prepared split"),
    "convert": ("convert", "convert a checkpoint: JAX, PyTorch, Hugging Face, GGUF"),
    "publish": ("publish", "evaluate a checkpoint, write a Hugging Face repository, upload it"),
    "parity": ("parity", "compare two checkpoints stage by stage, and say why they differ"),
    "plot": ("plot", "draw loss, learning rate, gradient norm and speed of runs"),
    "compare-runs": ("compare_runs", "draw the loss curves of two runs and their difference"),
    "plan": ("plan", "print parameters, operations and memory of a configuration of any size"),
    "benchmark": ("benchmark", "measure training and decoding, next to other libraries and to this machine's bounds"),
}
"""Command -> its module, and a description."""


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name.ljust(width)}{does}" for name, (_, does) in COMMANDS.items()]
    first = "usage: minillm COMMAND [ARGUMENTS]\n\nOne language model in JAX and PyTorch, proven to be one model.\n"
    return "\n".join(
        [
            first,
            *lines,
            "",
            "minillm COMMAND --help lists the arguments of a command; minillm --version shows the version.",
        ]
    )


def main() -> None:
    run(_dispatch)


def _dispatch() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"minillm {__version__}")
        return
    name = arguments[0].replace("_", "-")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `minillm {close[0]}`?" if close else "run `minillm --help` for the list"
        raise InputError("unknown command", expected=", ".join(COMMANDS), found=repr(arguments[0]), hint=hint)
    if name == "train":
        set_malloc()
    sys.argv = [f"minillm {name}", *arguments[1:]]
    importlib.import_module(f"minillm_cli.{COMMANDS[name][0]}").main()
