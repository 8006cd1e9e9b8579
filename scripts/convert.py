"""Converts a checkpoint between the frameworks, bit for bit: weights, Adam moments, step, configuration.

    python scripts/convert.py 'torch->jax' [SRC [DST]]

SRC is a run or a checkpoint (default: runs/quickstart); DST is a run directory. Without DST the copy goes into the
same run, or into RUN-from-torch if that run holds training of its own in the other framework.

    python scripts/convert.py 'hf->jax' FOLDER RUN
    python scripts/convert.py 'jax->hf' [SRC [FOLDER]]

To and from Hugging Face's format (`hf`), for either framework: the weights and the tokenizer of any model of the Llama
architecture. What the architecture lacks is refused by name.

    python scripts/convert.py 'minillm->jax' ckpt.pt RUN

From the original Mini-LLM's ckpt.pt, or the folder of its model.safetensors and config.json.

    python scripts/convert.py 'jax->gguf' [SRC [FILE.gguf]] [--dtype q8_0]
    python scripts/convert.py 'gguf->jax' FILE.gguf RUN

To and from llama.cpp's format (default file: RUN/NAME-DTYPE.gguf). Quantised weights are read as the float32 numbers
that they stand for.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from backends import load_backend

from minillm_core.backend import Backend
from minillm_core.bridge import OPENERS, export_gguf, export_hf, import_checkpoint
from minillm_core.checkpoints import (
    FRAMEWORKS,
    CheckpointInfo,
    CheckpointWriter,
    TrainingState,
    checkpoint_steps,
    find_checkpoint,
    payload_bytes,
    read_info,
    verify_checkpoint,
)
from minillm_core.cli import run, say
from minillm_core.errors import InputError
from minillm_core.files import make_folder
from minillm_core.metrics import read_metrics, write_metrics
from minillm_core.rundir import open_run

FORMATS = (*FRAMEWORKS, *OPENERS)
DEFAULT_RUN = "runs/quickstart"


def main() -> None:
    arguments = undo_redirection(sys.argv[1:])
    direction, source, destination, dtype = tyro.cli(parse, args=arguments, description=__doc__)
    source_format, target_format = parse_direction(direction)
    if (target_format, dtype) in (("hf", "q8_0"), ("gguf", "float64")):
        raise InputError(f"{target_format} has no {dtype}", do="choose another --dtype")
    if target_format in FRAMEWORKS and dtype != "float32":
        do = "leave --dtype out: it is of the weights for hf or gguf"
        raise InputError(f"a conversion to {target_format} does not round", found=f"--dtype {dtype}", do=do)
    if target_format == "hf":
        checkpoint = find_checkpoint(source or DEFAULT_RUN, source_format)
        folder = Path(destination) if destination else checkpoint.parent.parent.parent / f"hf-{source_format}"
        print(export_hf(checkpoint, folder, load_backend(source_format), dtype))
    elif target_format == "gguf":
        checkpoint = find_checkpoint(source or DEFAULT_RUN, source_format)
        run_dir = checkpoint.parent.parent.parent
        file = Path(destination) if destination else run_dir / f"{run_dir.resolve().name}-{dtype}.gguf"
        print(export_gguf(checkpoint, file, load_backend(source_format), dtype))
    elif source_format in OPENERS:
        if source is None or destination is None:
            expected, found = f"'{source_format}->{target_format}' SRC RUN", "no SRC" if source is None else "no RUN"
            raise InputError("a path is missing", expected=expected, found=found, do="name both, e.g. runs/imported")
        print(import_checkpoint(source_format, Path(source), Path(destination), load_backend(target_format)))
    else:
        convert(source_format, target_format, source or DEFAULT_RUN, destination)


def parse(
    direction: tyro.conf.Positional[str],
    src: tyro.conf.Positional[str | None] = None,
    dst: tyro.conf.Positional[str | None] = None,
    dtype: Literal["float32", "bfloat16", "float16", "float64", "q8_0"] = "float32",
) -> tuple[str, str | None, str | None, str]:
    """Converts a checkpoint.

    Args:
        direction: 'torch->jax', 'hf->jax', 'jax->gguf' or the like, quoted; torch-to-jax needs no quotes.
        src: a run, a run's framework folder, or one checkpoint (default: runs/quickstart); or what is imported.
        dst: the run directory, the Hugging Face folder or the GGUF file to write (default: in the same run).
        dtype: of the weights for hf (not q8_0) or gguf (not float64).
    """
    return direction, src, dst, dtype


def parse_direction(direction: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\w+)(?:->|-to-)(\w+)", direction)
    known = {(source, target) for source in FORMATS for target in FRAMEWORKS}
    known |= {(source, target) for source in FRAMEWORKS for target in ("hf", "gguf")}
    if not match or match[1] == match[2] or match.groups() not in known:
        expected = "'torch->jax', 'hf->jax', 'minillm->jax', 'gguf->jax', 'jax->hf', 'jax->gguf' or the like"
        do = f"write 'SOURCE->TARGET', quoted, of {', '.join(FORMATS)}"
        if match and {*match.groups()} <= {*FORMATS} and match[1] != match[2]:
            do = f"in two steps: '{match[1]}->jax', then 'jax->{match[2]}'"
        raise InputError("unknown conversion", expected=expected, found=repr(direction), do=do)
    return match[1], match[2]


def undo_redirection(arguments: list[str]) -> list[str]:
    """Unquoted, a shell turns `torch->jax` into the argument `torch-` and sends our output to a file `jax`: does what
    was meant, prints to the terminal, and removes that file if the shell has made it."""
    if not arguments or arguments[0].removesuffix("-") not in FORMATS or not arguments[0].endswith("-"):
        return arguments
    source = arguments[0].removesuffix("-")
    strays = [Path(name) for name in FORMATS if Path(name).is_file()]
    ours = [path for path in strays if path.stat().st_size == 0 and os.path.samestat(os.fstat(1), path.stat())]
    target = ours[0].name if ours else next(name for name in FRAMEWORKS if name != source)
    say(f"reading `{arguments[0]}` as '{source}->{target}': the shell takes an unquoted > as a redirection; quote it")
    for stray in ours:
        os.dup2(2, 1)
        if stray.stat().st_atime_ns == stray.stat().st_mtime_ns:  # emptying a file does not change when it was read
            stray.unlink()
            say(f"removed the empty file `{stray}` which that redirection made")
        else:
            say(f"your file `{stray}` was there before: that redirection has emptied it")
    return [f"{source}->{target}", *arguments[1:]]


def convert(source: str, target: str, source_path: str, destination: str | None) -> Path:
    """Writes the checkpoint that `source_path` means into the run `destination`; returns the new checkpoint.

    Raises:
        InputError: no such checkpoint, a damaged one, or a destination that holds another run or checkpoint.
    """
    reader, writer = load_backend(source), load_backend(target)
    checkpoint = find_checkpoint(source_path, source)
    verify_checkpoint(checkpoint)
    info = read_info(checkpoint)
    state = reader.read_payload(checkpoint, info.config)
    run_dir = Path(destination) if destination else default_destination(checkpoint, source, target)
    with open_run(run_dir, info.config, checkpoint, info.data_hashes, info.config.train.compute_dtype):
        result = write(writer, run_dir / target, checkpoint, info, state)
    say(f'try: python scripts/generate.py {run_dir} --backend {target} --prompt "My fellow citizens,"')
    if info.step < info.config.train.steps and "train" in info.data_hashes:  # an imported model is not trained on
        config = f"{run_dir}/config.yaml --train.out_dir {run_dir}"
        say(f"to train on: python scripts/train_{target}.py {config}")
    print(result)
    return result


def write(writer: Backend, folder: Path, checkpoint: Path, info: CheckpointInfo, state: TrainingState) -> Path:
    """Commits the copy into its framework's folder, with the metrics up to its step."""
    result = folder / "checkpoints" / str(info.step)
    if result.exists():
        verify_checkpoint(result)
        if not same_tensors(writer, result, state):
            raise InputError(
                "the destination holds another checkpoint of this step", where=result, do="give another destination run"
            )
        say(f"already converted: {result} holds the same tensors")
        return result
    if not holds_copies(folder):
        raise InputError("the destination was trained itself", where=folder, do="give another destination run")
    metrics = checkpoint.parent.parent / "metrics.jsonl"
    is_newest = all(step < info.step for step in checkpoint_steps(folder / "checkpoints"))
    if metrics.exists() and is_newest:
        make_folder(folder)
        write_metrics(folder / "metrics.jsonl", read_metrics(metrics, info.step))
    copy = replace(info, framework=writer.FRAMEWORK, converted_from=info.framework)

    def start_payload(partial_folder: Path) -> Callable[[], None]:
        return partial(writer.write_payload, partial_folder, info.config, state)

    with CheckpointWriter(folder / "checkpoints") as checkpoints:
        n_bytes = payload_bytes(state.weights, state.exp_avg, state.exp_avg_sq)
        checkpoints.save(copy, checkpoint, start_payload, n_bytes=n_bytes)
    n_moments = len(state.exp_avg) + len(state.exp_avg_sq)
    say(f"converted {checkpoint}: {len(state.weights)} weights, {n_moments} Adam moments, step {info.step}")
    if not state.exp_avg and "train" in info.data_hashes:
        say("the source has no optimizer state: training on from here would restart Adam's moments at zero")
    return result


def default_destination(checkpoint: Path, source: str, target: str) -> Path:
    """The checkpoint's own run, or a new one beside it if that run was itself trained in the target framework."""
    if checkpoint.parent.name != "checkpoints" or checkpoint.parent.parent.name != source:
        raise InputError("the checkpoint is not inside a run", where=checkpoint, do="name a destination run")
    run_dir = checkpoint.parent.parent.parent
    if holds_copies(run_dir / target):
        return run_dir
    beside = run_dir.with_name(f"{run_dir.name}-from-{source}")
    say(f"{run_dir / target} holds training of its own, so the copy goes to {beside}")
    return beside


def holds_copies(folder: Path) -> bool:
    """Whether a framework's folder of a run has nothing but converted checkpoints."""
    checkpoints = folder / "checkpoints"
    return all(read_info(checkpoints / str(step)).converted_from for step in checkpoint_steps(checkpoints))


def same_tensors(backend: Backend, checkpoint: Path, state: TrainingState) -> bool:
    found = backend.read_payload(checkpoint, read_info(checkpoint).config)
    return all(
        ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
        for ours, theirs in (
            (state.weights, found.weights),
            (state.exp_avg, found.exp_avg),
            (state.exp_avg_sq, found.exp_avg_sq),
        )
    )


if __name__ == "__main__":
    run(main)
