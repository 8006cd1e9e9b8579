"""Copies a checkpoint of one framework to the other, bit for bit: weights, Adam moments, step, configuration."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from minillm_core.errors import InputError
from minillm_core.files import make_folder, real_path
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
from minillm_core.training.metrics import METRICS, read_metrics, write_metrics
from minillm_core.training.run_directory import RunDirectory, resolve_compute_dtype, saved_config

logger = logging.getLogger(__name__)


def copy_checkpoint(checkpoint: Path, run_dir: Path | None, reader: Backend, writer: Backend) -> Path:
    """Copies a checkpoint of `reader`'s framework into a run, as a checkpoint of `writer`'s framework.

    Args:
        run_dir: the destination run. None: the checkpoint's own run or, if that run was also trained in the target
            framework, a run next to it named `NAME-from-FRAMEWORK`.

    Returns:
        the new checkpoint, or the existing one if the destination already holds the same tensors.

    Raises:
        InputError: the checkpoint is damaged, or the destination holds a different run or checkpoint.
    """
    verify_checkpoint(checkpoint)
    info = read_info(checkpoint)
    state = reader.read_payload(checkpoint, info.config)
    run_dir = _default_destination(checkpoint, reader.FRAMEWORK, writer.FRAMEWORK) if run_dir is None else run_dir
    config = resolve_compute_dtype(info.config, saved_config(run_dir), info.config.train.compute_dtype)
    with RunDirectory(run_dir, config).opened(checkpoint, info.data_hashes):
        return _write(writer, run_dir / writer.FRAMEWORK, checkpoint, info, state)


def _write(writer: Backend, folder: Path, checkpoint: Path, info: CheckpointInfo, state: TrainingState) -> Path:
    """Writes the copy into the target framework's folder of the run, with the metrics up to its step."""
    result = folder / "checkpoints" / str(info.step)
    if result.exists():
        verify_checkpoint(result)
        if not _same_tensors(writer, result, state):
            problem = "the destination holds a different checkpoint of this step"
            hint = "use a different destination run"
            raise InputError(problem, where=result, hint=hint)
        logger.info(f"already converted: {result} holds the same tensors")
        return result
    if not _holds_copies(folder):
        hint = "use a different destination run"
        raise InputError("the destination run was also trained in this framework", where=folder, hint=hint)
    metrics = checkpoint.parent.parent / METRICS
    is_newest = all(step < info.step for step in checkpoint_steps(folder / "checkpoints"))
    if metrics.exists() and is_newest:
        make_folder(folder)
        write_metrics(folder / METRICS, read_metrics(metrics, info.step))
    copy = replace(info, framework=writer.FRAMEWORK, converted_from=info.framework)

    def start_payload(partial_folder: Path) -> Callable[[], None]:
        return partial(writer.write_payload, partial_folder, info.config, state)

    with CheckpointWriter(folder / "checkpoints", in_background=False) as checkpoints:
        n_bytes = payload_bytes(state.weights, state.exp_avg, state.exp_avg_sq)
        checkpoints.save(copy, checkpoint, start_payload, n_bytes=n_bytes)
    n_moments = len(state.exp_avg) + len(state.exp_avg_sq)
    logger.info(f"converted {checkpoint}: {len(state.weights)} weights, {n_moments} Adam moments, step {info.step}")
    if not state.exp_avg and info.has_data:
        logger.warning("the source has no optimizer state: further training restarts Adam's moments at zero")
    return result


def _default_destination(checkpoint: Path, source: str, target: str) -> Path:
    """The checkpoint's own run, or a new run next to it if that run was also trained in the target framework."""
    if checkpoint.parent.name != "checkpoints" or checkpoint.parent.parent.name != source:
        raise InputError("the checkpoint is not inside a run", where=checkpoint, hint="give a destination run")
    run_dir = checkpoint.parent.parent.parent
    if _holds_copies(run_dir / target):
        return run_dir
    if run_dir.name in ("", ".."):
        run_dir = real_path(run_dir)
    beside = run_dir.with_name(f"{run_dir.name}-from-{source}")
    logger.info(f"{run_dir / target} holds checkpoints of its own training, so the copy is written to {beside}")
    return beside


def _holds_copies(folder: Path) -> bool:
    """Whether a framework's folder of a run has only converted checkpoints (or none)."""
    checkpoints = folder / "checkpoints"
    return all(read_info(checkpoints / str(step)).converted_from for step in checkpoint_steps(checkpoints))


def _same_tensors(backend: Backend, checkpoint: Path, state: TrainingState) -> bool:
    found = backend.read_payload(checkpoint, read_info(checkpoint).config)
    return all(
        ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
        for ours, theirs in zip(vars(state).values(), vars(found).values(), strict=True)
    )
