"""A checkpoint of one framework copied into the other, bit for bit: weights, Adam moments, step, configuration."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from minillm_core.errors import InputError
from minillm_core.files import make_folder
from minillm_core.training.backend import Backend
from minillm_core.training.checkpoints import (
    CheckpointInfo,
    CheckpointWriter,
    TrainingState,
    checkpoint_steps,
    payload_bytes,
    read_info,
    verify_checkpoint,
)
from minillm_core.training.metrics import read_metrics, write_metrics
from minillm_core.training.run_directory import open_run

logger = logging.getLogger(__name__)


def copy_checkpoint(checkpoint: Path, run_dir: Path | None, reader: Backend, writer: Backend) -> Path:
    """Copies a checkpoint of `reader`'s framework into a run, as one of `writer`'s.

    Args:
        run_dir: by default the checkpoint's own run or, if that was itself trained in the target framework, a run
            beside it, `NAME-from-FRAMEWORK`.

    Returns:
        the new checkpoint; if the run holds the same tensors already, that one.

    Raises:
        InputError: the checkpoint is damaged, or the destination holds a different run or checkpoint.
    """
    verify_checkpoint(checkpoint)
    info = read_info(checkpoint)
    state = reader.read_payload(checkpoint, info.config)
    run_dir = _default_destination(checkpoint, reader.FRAMEWORK, writer.FRAMEWORK) if run_dir is None else run_dir
    with open_run(run_dir, info.config, checkpoint, info.data_hashes):
        return _write(writer, run_dir / writer.FRAMEWORK, checkpoint, info, state)


def _write(writer: Backend, folder: Path, checkpoint: Path, info: CheckpointInfo, state: TrainingState) -> Path:
    """Commits the copy into its framework's folder, with the metrics up to its step."""
    result = folder / "checkpoints" / str(info.step)
    if result.exists():
        verify_checkpoint(result)
        if not _same_tensors(writer, result, state):
            problem, hint = "the destination holds a different checkpoint of this step", "give another destination run"
            raise InputError(problem, where=result, hint=hint)
        logger.info("already converted: %s holds the same tensors", result)
        return result
    if not _holds_copies(folder):
        hint = "give another destination run"
        raise InputError("the destination has been trained in this framework itself", where=folder, hint=hint)
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
    logger.info(
        "converted %s: %d weights, %d Adam moments, step %d", checkpoint, len(state.weights), n_moments, info.step
    )
    if not state.exp_avg and "train" in info.data_hashes:
        logger.warning("the source has no optimizer state: further training restarts Adam's moments at zero")
    return result


def _default_destination(checkpoint: Path, source: str, target: str) -> Path:
    """The checkpoint's own run, or a new one beside it if that run was itself trained in the target framework."""
    if checkpoint.parent.name != "checkpoints" or checkpoint.parent.parent.name != source:
        raise InputError("the checkpoint is not inside a run", where=checkpoint, hint="name a destination run")
    run_dir = checkpoint.parent.parent.parent
    if _holds_copies(run_dir / target):
        return run_dir
    beside = run_dir.with_name(f"{run_dir.name}-from-{source}")
    logger.info("%s has been trained itself, so the copy goes to %s", run_dir / target, beside)
    return beside


def _holds_copies(folder: Path) -> bool:
    """Whether a framework's folder of a run has nothing but converted checkpoints."""
    checkpoints = folder / "checkpoints"
    return all(read_info(checkpoints / str(step)).converted_from for step in checkpoint_steps(checkpoints))


def _same_tensors(backend: Backend, checkpoint: Path, state: TrainingState) -> bool:
    found = backend.read_payload(checkpoint, read_info(checkpoint).config)
    return all(
        ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
        for ours, theirs in zip(vars(state).values(), vars(found).values(), strict=True)
    )
