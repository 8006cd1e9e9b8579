"""Publishes a checkpoint: a folder in the form of a Hugging Face repository, with an evaluation, and its upload."""

import logging
from dataclasses import dataclass
from pathlib import Path

from minillm_core.errors import InputError
from minillm_core.files import require_writable, user_path
from minillm_core.interop import hub
from minillm_core.interop.conversion import EXPORT_DTYPES
from minillm_core.interop.evaluation import Evaluation, evaluate_checkpoint
from minillm_core.interop.exports import export_hf
from minillm_core.training.backend import load_backend
from minillm_core.training.checkpoints import find_checkpoint, read_info, verify_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """What was written, and where it was uploaded to."""

    checkpoint: Path
    folder: Path
    evaluation: Evaluation | None
    """None if it was left out, or if the run has no data."""
    commit_url: str | None
    """The address of the commit; None if nothing was uploaded."""


def publish(
    run: str | Path,
    folder: str | Path | None = None,
    *,
    backend: str = "jax",
    repo: str | None = None,
    private: bool = False,
    dtype: str = "float32",
    split: str = "val",
    data_dir: str | None = None,
    seq_len: int | None = None,
    evaluate: bool = True,
) -> Publication:
    """Evaluates a checkpoint, writes it as the folder of a Hugging Face repository, and uploads the folder.

    The folder has the weights, the configuration, the tokenizer, the loss curve if there is one, and a model card with
    the evaluation. It appears when it is complete. The model card names no licence.

    Args:
        run: a run, its framework folder, or one checkpoint.
        folder: the folder to write; None: `published-BACKEND` in the run.
        backend: the framework of the checkpoint.
        repo: the repository OWNER/NAME to upload to; None: no upload.
        private: create a private repository.
        dtype: of the weights: float32, bfloat16, float16 or float64. The evaluation is in float64 for float64, and in
            float32 otherwise, with the weights before they are rounded.
        split: the split to evaluate, `val` or `train`.
        data_dir: a folder of prepared data to evaluate on; None: the data of the run.
        seq_len: tokens per window of the evaluation; None: the run's.
        evaluate: False leaves out the evaluation. A checkpoint without data (an imported model) is not evaluated
            unless `data_dir` is given.

    Raises:
        InputError: the checkpoint, its data or an argument is unusable, or the Hub refuses the token; nothing is
            written in these cases. Or the upload failed: the folder is complete then (see `hub.upload`).
    """
    if dtype not in EXPORT_DTYPES["hf"]:
        raise InputError("unknown dtype", expected=", ".join(EXPORT_DTYPES["hf"]), found=dtype)
    if repo is not None:
        hub.check_repo(repo)
    elif private:
        raise InputError("a private repository without a name", expected="OWNER/NAME", hint="add --repo OWNER/NAME")
    checkpoint = find_checkpoint(run, backend)
    target = checkpoint.parent.parent.parent / f"published-{backend}" if folder is None else user_path(folder)
    _refuse_existing(target, repo, private)
    require_writable(target)
    if repo is not None:
        hub.check_access()
    verify_checkpoint(checkpoint)
    framework = load_backend(backend)
    found = None
    if evaluate and data_dir is None and not read_info(checkpoint).has_data:
        logger.warning("the model was imported, so it has no held-out text: the model card has no evaluation")
    elif evaluate:
        compute = "float64" if dtype == "float64" else "float32"
        try:
            found = evaluate_checkpoint(
                checkpoint, framework, split=split, data_dir=data_dir, seq_len=seq_len, dtype=compute
            )
        except InputError as error:
            hint = (
                "to publish without an evaluation: --no-evaluate; to evaluate on data in a different folder: --data-dir"
            )
            raise InputError(
                f"the checkpoint cannot be evaluated: {error}\n  or: {hint}", command=error.command
            ) from error
    export_hf(checkpoint, target, framework, dtype, evaluation=found, repo=repo)
    if repo is None:
        return Publication(checkpoint, target, found, None)
    logger.info(f"{target} is complete; uploading it to {repo}")
    return Publication(checkpoint, target, found, hub.upload(target, repo, private=private))


def _refuse_existing(folder: Path, repo: str | None, private: bool) -> None:
    """Raises InputError if the folder exists; if it may be a finished one, the hint says how to upload it."""
    if folder.exists():
        hint = "give a different name, or remove it"
        if repo is not None and (folder / "config.json").is_file():
            hint += f"; to upload it as it is: {hub.upload_command(folder, repo, private=private)}"
        raise InputError("the destination exists", where=folder, hint=hint)
