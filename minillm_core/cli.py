"""What the scripts share: parsing a RunConfig, and turning a user's mistake into a message and an exit code."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import tyro

from minillm_core.config import RunConfig, load_config, preset_names
from minillm_core.errors import InputError, Interrupted
from minillm_core.files import is_disk_full

C = TypeVar("C", bound=RunConfig)


def say(message: str = "") -> None:
    """Prints for the person at the terminal (stderr), if there is one still; stdout carries results alone."""
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr, flush=True)


def print_stream(prompt: str, pieces: Iterable[str]) -> None:
    """Prints a prompt and its continuation to stdout as it comes."""
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def run(main: Callable[[], None]) -> None:
    """Calls a script's main: exits with 2 and a plain message on an InputError or a full disk, with 130 on Ctrl-C."""
    for library in ("absl", "asyncio"):  # Orbax reports every file it writes, and every error that it raises too
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        main()
    except InputError as error:
        say(f"error: {error}")
        sys.exit(2)
    except Interrupted as request:
        sys.exit(128 + request.signal)
    except KeyboardInterrupt:
        say("interrupted")
        sys.stdout.flush()
        os._exit(130)  # at once: taking Python down while XLA compiles in a thread has ended in a segmentation fault
    except BrokenPipeError:  # the reader of our stdout went away, as in `| head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if is_disk_full(error):
            problem, do = (
                "the disk is full, or a file may not be so large",
                "free some space; nothing that was saved is lost",
            )
        elif error.filename is None:
            raise
        else:
            problem, do = error.strerror or str(error), "check the paths given"
        say(f"error: {InputError(problem, where=error.filename, do=do)}")
        sys.exit(2)


def parse_run_config(description: str | None, config_class: type[C], preset: str = "quickstart") -> C:
    """Reads `[PRESET|FILE.yaml] [--section.field value ...]` from the command line.

    Args:
        config_class: RunConfig, or a subclass whose further fields, which need defaults, become options too.
        preset: taken if the command line names none.
    """
    # As in YAML: true, false; tyro knows Python's.
    arguments = [word.capitalize() if word in ("true", "false") else word for word in sys.argv[1:]]
    named = bool(arguments) and not arguments[0].startswith("-")
    loaded = load_config(arguments[0] if named else preset)
    description = (
        f"{description}\n\nFirst argument: a preset ({', '.join(preset_names())}) or a .yaml file; "
        f"the options below change single fields of it. Without it: {preset}."
    )
    return tyro.cli(
        config_class,
        default=config_class(loaded.model, loaded.optim, loaded.data, loaded.train),
        args=arguments[named:],
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
