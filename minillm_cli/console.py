"""What the commands share: printing, parsing a RunConfig, and turning bad input into a message and an exit status."""

import codecs
import contextlib
import io
import itertools
import locale
import logging
import os
import shlex
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from minillm_cli.process import is_command
from minillm_cli.progress_bar import above_bar, end_bar, progress_bar
from minillm_core.config import RunConfig, load_config, preset_names
from minillm_core.errors import InputError, Interrupted
from minillm_core.files import is_disk_full, owner
from minillm_core.progress import listen

C = TypeVar("C", bound=RunConfig)
T = TypeVar("T")

SCRIPTS = {"prepare": "prepare_data"}
"""Commands whose script has a different name."""

_started_as_script = False
"""Whether the user typed `python scripts/...`, and not `minillm`."""


def say(message: str = "") -> None:
    """Prints a message for the user to stderr, and ignores a stderr that is closed or full. Only results go to
    stdout."""
    with contextlib.suppress(OSError), above_bar():
        print(message, file=sys.stderr, flush=True)


def print_stream(prompt: str, pieces: Iterable[str]) -> None:
    """Prints a prompt and its continuation to stdout, piece by piece as it is generated."""
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def command_line(command: Sequence[str]) -> str:
    """A command as the user would type it: as a script, if this process was started as one, or with `minillm`."""
    name, *arguments = command
    arguments = [f"./{word}" if word.startswith("~") else word for word in arguments]  # a name, not a home folder
    if not _started_as_script:
        return shlex.join(["minillm", name, *arguments])
    if name == "train" and "--backend" in arguments:
        at = arguments.index("--backend")
        name = f"train_{arguments[at + 1]}"
        del arguments[at : at + 2]
    return shlex.join(["python", f"scripts/{SCRIPTS.get(name, name.replace('-', '_'))}.py", *arguments])


class _Console(logging.Handler):
    """Prints the log messages of the libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        say(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage())


def show_progress() -> None:
    """Sends the log messages and the progress of this project's packages to stderr, and silences those of others."""
    listen(progress_bar)
    for library in ("HF_DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    for library in ("absl", "asyncio"):  # Orbax logs every file that it writes, and also every error that it raises
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for package in ("minillm_core", "minillm_jax", "minillm_torch"):
        ours = logging.getLogger(package)
        ours.setLevel(logging.INFO)
        ours.propagate = False
        if not any(isinstance(handler, _Console) for handler in ours.handlers):
            ours.addHandler(_Console())


def _use_utf8() -> None:
    """Starts this process again in Python's UTF-8 mode if the locale has a different encoding. Then arguments, names of
    files and output are the same in every locale."""
    if is_command() and not sys.flags.utf8_mode and codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _what_cannot_be_encoded(error: UnicodeError) -> tuple[bytes, int]:
    """Encodes the bytes of a name that is not UTF-8 as they are, and a question mark for any other character that a
    stream cannot show."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = map(ord, error.object[error.start : error.end])
    return bytes(c - 0xDC00 if 0xDC80 <= c <= 0xDCFF else ord("?") for c in characters), error.end


def run(main: Callable[[], None], *, as_script: bool = False) -> None:
    """Calls a command's main. After an InputError, a full disk or a file error, it exits with status 2 and a plain
    message; after Ctrl-C, with status 130."""
    global _started_as_script
    _started_as_script = as_script
    _use_utf8()
    show_progress()
    codecs.register_error("minillm", _what_cannot_be_encoded)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="minillm")
    try:
        try:
            main()
        finally:
            end_bar()
    except InputError as error:
        say(f"error: {error}" + (f"\n  command: {command_line(error.command)}" if error.command else ""))
        sys.exit(2)
    except Interrupted as request:
        sys.exit(128 + request.signal)
    except KeyboardInterrupt:
        say("interrupted")
        sys.stdout.flush()
        os._exit(130)  # not sys.exit: a normal exit while XLA compiles in a thread has caused a segmentation fault
    except BrokenPipeError:  # the program that reads our stdout has ended, as in `| head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if is_disk_full(error):
            problem = "the disk is full, or a file exceeds the size limit"
            hint = "free some space; everything saved before is intact"
        elif error.filename is None:
            raise
        else:
            problem, hint = error.strerror or str(error), "check the given paths"
        where = error.filename if error.filename is None else owner(Path(os.fsdecode(error.filename)))
        say(f"error: {InputError(problem, where=where, hint=hint)}")
        sys.exit(2)


def parse(command: Callable[..., T], *, arguments: Sequence[str] | None = None, **how: Any) -> T:
    """Calls a command with the arguments of the command line, as tyro reads them; `how` goes to `tyro.cli`.

    Raises:
        InputError: an option is given twice; tyro would use the last one.
    """
    words = sys.argv[1:] if arguments is None else arguments
    seen: dict[str, str] = {}
    for word, following in itertools.pairwise([*itertools.takewhile(lambda word: word != "--", words), ""]):
        name, equals, value = word.partition("=")
        name, value = name.replace("_", "-"), value if equals else following
        if not name.startswith("--"):
            continue
        if name in seen:
            hint = "give it once; an option with several values takes them together, as in `--stop A B`"
            raise InputError(f"{name} is given twice", found=f"{seen[name]!r} and {value!r}", hint=hint)
        seen[name] = value
    return tyro.cli(command, args=words, **how)


def _python_words(words: Sequence[str], config_class: type) -> list[str]:
    """Replaces `true`, `false` and `null` by Python's words, which tyro expects, in the options of fields that can have
    such a value."""
    sections = typing.get_type_hints(config_class)
    changed = list(words)
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        section, _, field = option.removeprefix("--").replace("-", "_").partition(".")
        hints = typing.get_type_hints(sections[section]) if field and section in sections else {}
        options = {hints.get(field), *typing.get_args(hints.get(field))}
        known = {"true": "True", "false": "False"} if bool in options else {}
        known |= {"null": "None"} if type(None) in options else {}
        if equals:
            changed[i] = f"{option}={known.get(value, value)}"
        elif i + 1 < len(words):
            changed[i + 1] = known.get(words[i + 1], words[i + 1])
    return changed


def parse_run_config(description: str | None, config_class: type[C], preset: str = "quickstart") -> C:
    """Reads `[PRESET|FILE.yaml] [--section.field value ...]` from the command line.

    Args:
        config_class: RunConfig, or a subclass. Its additional fields need defaults and become options too.
        preset: used if the command line names neither a preset nor a file.
    """
    arguments = _python_words(sys.argv[1:], config_class)
    named = bool(arguments) and not arguments[0].startswith("-")
    loaded = load_config(arguments[0] if named else preset)
    description = (
        f"{description}\n\nFirst argument: a preset ({', '.join(preset_names())}) or a .yaml file. "
        f"Default: {preset}. The options below change single fields of it."
    )
    return parse(
        config_class,
        arguments=arguments[named:],
        default=config_class(loaded.model, loaded.optim, loaded.data, loaded.train),
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
