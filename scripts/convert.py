"""Converts a checkpoint between the frameworks, bit for bit: weights, Adam moments, step, configuration.

    python scripts/convert.py 'torch->jax' [SRC [DST]]

SRC is a run or a checkpoint (default: runs/quickstart); DST is a run directory. Without DST the copy goes into the
same run, or into RUN-from-torch if that run holds training of its own in the other framework.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import tyro
from backends import load_backend

from minillm_core.backend import Backend
from minillm_core.checkpoints import (
    FRAMEWORKS,
    CheckpointInfo,
    CheckpointWriter,
    TrainingState,
    checkpoint_steps,
    find_checkpoint,
    read_info,
    verify_checkpoint,
)
from minillm_core.cli import run, say
from minillm_core.errors import InputError
from minillm_core.files import make_folder
from minillm_core.metrics import read_metrics, write_metrics
from minillm_core.rundir import open_run


def main() -> None:
    arguments = undo_redirection(sys.argv[1:])
    direction, source, destination = tyro.cli(parse, args=arguments, description=__doc__)
    convert(*parse_direction(direction), source, destination)


def parse(
    direction: tyro.conf.Positional[str],
    src: tyro.conf.Positional[str] = "runs/quickstart",
    dst: tyro.conf.Positional[str | None] = None,
) -> tuple[str, str, str | None]:
    """Converts a checkpoint.

    Args:
        direction: 'torch->jax' or 'jax->torch', quoted; torch-to-jax needs no quotes.
        src: a run, a run's framework folder, or one checkpoint.
        dst: the run directory to write into.
    """
    return direction, src, dst


def parse_direction(direction: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\w+)(?:->|-to-)(\w+)", direction)
    if not match or set(match.groups()) != set(FRAMEWORKS):
        raise InputError("unknown conversion", expected="'torch->jax' or 'jax->torch'", found=repr(direction))
    return match[1], match[2]


def undo_redirection(arguments: list[str]) -> list[str]:
    """Unquoted, a shell turns `torch->jax` into the argument `torch-` and sends our output to a file `jax`: does what
    was meant, and removes that file if it is ours and empty."""
    if not arguments or arguments[0].removesuffix("-") not in FRAMEWORKS or not arguments[0].endswith("-"):
        return arguments
    source = arguments[0].removesuffix("-")
    target = next(name for name in FRAMEWORKS if name != source)
    say(f"reading `{arguments[0]}` as '{source}->{target}': the shell takes an unquoted > as a redirection; quote it")
    stray = Path(target)
    if stray.is_file() and stray.stat().st_size == 0 and os.path.samestat(os.fstat(1), stray.stat()):
        stray.unlink()
        say(f"removed the empty file `{stray}` which that redirection made")
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
    state = reader.read_payload(checkpoint, info.config, moments=True)
    run_dir = Path(destination) if destination else default_destination(checkpoint, source, target)
    tokenizer = checkpoint / "tokenizer.model"
    with open_run(run_dir, info.config, tokenizer, info.data_hashes, info.config.train.compute_dtype):
        result = write(writer, run_dir / target, checkpoint, info, state)
    say(f'try: python scripts/generate.py {run_dir} --backend {target} --prompt "My fellow citizens,"')
    if info.step < info.config.train.steps:
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
        checkpoints.save(copy, checkpoint / "tokenizer.model", start_payload)
    n_moments = len(state.exp_avg) + len(state.exp_avg_sq)
    say(f"converted {checkpoint}: {len(state.weights)} weights, {n_moments} Adam moments, step {info.step}")
    if not state.exp_avg:
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
    found = backend.read_payload(checkpoint, read_info(checkpoint).config, moments=True)
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
