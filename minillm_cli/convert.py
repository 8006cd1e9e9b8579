"""Converts a checkpoint.

    'torch->jax' [SRC [DST]]

Copies weights, Adam moments, step and configuration to the other framework, bit for bit (also 'jax->torch'). SRC is a
run or a checkpoint (default: runs/quickstart); DST is a run directory. Without DST, the copy goes into the same run, or
into RUN-from-torch if that run was also trained in the target framework.

    'hf->jax' FOLDER RUN
    'jax->hf' [SRC [FOLDER]]

Imports from and exports to the Hugging Face format, in either framework: weights and tokenizer of any model of the
Llama architecture. A model with a feature outside this architecture is refused, and the message names the feature.

    'minillm->jax' ckpt.pt RUN

Imports the original Mini-LLM's ckpt.pt, or the folder with its model.safetensors and config.json.

    'jax->gguf' [SRC [FILE.gguf]] [--dtype q8_0]
    'gguf->jax' FILE.gguf RUN

Exports to and imports from llama.cpp's format (default file: RUN/NAME-DTYPE.gguf). Quantised weights are dequantised
to float32.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minillm_cli.console import command_line, parse, say
from minillm_cli.process import let_threads_sleep
from minillm_core.errors import InputError
from minillm_core.interop import Conversion, convert
from minillm_core.interop.conversion import FORMATS, parse_direction
from minillm_core.interop.imports import OPENERS
from minillm_core.training.checkpoints import FRAMEWORKS, foreign_kind

DEFAULT_RUN = "runs/quickstart"


def main() -> None:
    arguments = undo_redirection(sys.argv[1:])
    direction, source, destination, dtype = parse(read, arguments=arguments, description=__doc__)
    source_format, target_format = parse_direction(direction)
    if source is None and source_format in OPENERS:
        expected = f"'{source_format}->{target_format}' SRC RUN"
        raise InputError("a path is missing", expected=expected, found="no SRC", hint="give both a source and a run")
    let_threads_sleep()
    conversion = convert(direction, source or DEFAULT_RUN, destination, dtype=dtype)
    for command in next_commands(conversion):
        say(f"next: {command_line(command)}")
    print(conversion.result)


def read(
    direction: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE->TARGET")]],
    src: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[SRC]")]] = None,
    dst: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[DST]")]] = None,
    dtype: Literal["float32", "bfloat16", "float16", "float64", "q8_0"] = "float32",
) -> tuple[str, str | None, str | None, str]:
    """Converts a checkpoint.

    Args:
        direction: for example 'torch->jax', 'hf->jax' or 'jax->gguf'. Quote it; the form torch-to-jax needs no quotes.
        src: a run, a run's framework folder, or one checkpoint (default: runs/quickstart); or the file or folder to
            import.
        dst: the run directory, the Hugging Face folder or the GGUF file to write (default: inside the same run).
        dtype: dtype of the exported weights; hf has no q8_0, gguf has no float64.
    """
    return direction, src, dst, dtype


def next_commands(conversion: Conversion) -> list[tuple[str, ...]]:
    """Commands that a user may want to run next, with the result."""
    source_format, target_format = conversion.source_format, conversion.target_format
    source, result, run = str(conversion.source), str(conversion.result), str(conversion.run_dir)
    if source_format in OPENERS and foreign_kind(conversion.source) != source_format:
        source = f"{source_format}:{source}"
    commands: list[tuple[str, ...]] = []
    if not {source_format, target_format} <= {*FRAMEWORKS}:
        commands.append(("parity", source, result))
    if conversion.generates:
        commands.append(("generate", run, "--backend", target_format))
    if conversion.unfinished:
        commands.append(("train", f"{run}/config.yaml", "--backend", target_format, "--train.out_dir", run))
    return commands


def undo_redirection(arguments: list[str]) -> list[str]:
    """Repairs an unquoted `torch->jax`, which a shell turns into the argument `torch-` and a redirection of our output
    to a file `jax`: restores the direction, prints to the terminal, and removes the file if the shell created it."""
    if not arguments or arguments[0].removesuffix("-") not in FORMATS or not arguments[0].endswith("-"):
        return arguments
    source = arguments[0].removesuffix("-")
    strays = [Path(name) for name in FORMATS if Path(name).is_file()]
    ours = [path for path in strays if path.stat().st_size == 0 and os.path.samestat(os.fstat(1), path.stat())]
    target = ours[0].name if ours else next(name for name in FRAMEWORKS if name != source)
    say(f"reading `{arguments[0]}` as '{source}->{target}': the shell treats an unquoted > as a redirection; quote it")
    for stray in ours:
        os.dup2(2, 1)
        if stray.stat().st_atime_ns == stray.stat().st_mtime_ns:  # emptying a file does not change its access time
            stray.unlink()
            say(f"removed the empty file `{stray}`, which that redirection created")
        else:
            say(f"your file `{stray}` existed before; that redirection has emptied it")
    return [f"{source}->{target}", *arguments[1:]]
