"""Imports: makes a run from a checkpoint of another project."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from minillm_core.config import ModelConfig, RunConfig, load_config
from minillm_core.errors import InputError
from minillm_core.files import hash_arrays, hash_file
from minillm_core.interop.gguf import GGUFCheckpoint, open_gguf
from minillm_core.interop.hf import HFCheckpoint, open_hf
from minillm_core.interop.original import OriginalCheckpoint, open_original
from minillm_core.model.params import count_params, read_weights
from minillm_core.text.tokenizer import TOKENIZER_MODEL
from minillm_core.text.tokenizer_json import contradicting, load_tokenizer
from minillm_core.training.backend import Backend
from minillm_core.training.checkpoints import (
    CheckpointInfo,
    CheckpointWriter,
    TrainingState,
    checkpoint_steps,
    foreign_kind,
    payload_bytes,
)
from minillm_core.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

OPENERS: dict[str, Callable[[Path], HFCheckpoint | OriginalCheckpoint | GGUFCheckpoint]] = {
    "hf": open_hf,
    "minillm": open_original,
    "gguf": open_gguf,
}
"""Format -> the function that checks a checkpoint of this format without reading its weights."""


def open_foreign(format: str, source: Path) -> HFCheckpoint | OriginalCheckpoint | GGUFCheckpoint:
    """Checks a checkpoint of another project, without reading its weights.

    Raises:
        InputError: there is none, it is damaged, or it has features that the architecture cannot express.
    """
    _require_file_or_folder(source)
    return OPENERS[format](source)


def _require_file_or_folder(source: Path) -> None:
    if not (source.is_file() or source.is_dir()):  # a pipe would be read in vain
        raise InputError(
            "no such file or folder", expected="a checkpoint to import", where=source, hint="check the path"
        )


def import_checkpoint(format: str, source: Path, run_dir: Path, backend: Backend) -> Path:
    """Makes a run with one checkpoint, of step 0, from a checkpoint of another project.

    Weights become float32, except float64 weights, which are kept. The tokenizer files are copied unchanged.

    Args:
        format: `hf` (a Hugging Face folder), `minillm` (the original Mini-LLM's ckpt.pt or folder) or `gguf` (a file).

    Returns:
        the new checkpoint.

    Raises:
        InputError: the source is damaged, or has features that the architecture cannot express, or the run directory
            holds something different. Nothing is written in these cases.
    """
    _require_file_or_folder(source)
    kind = foreign_kind(source)
    # a folder of the original Mini-LLM may look like a Hugging Face folder
    if kind not in (None, format) and (format, kind) != ("minillm", "hf"):
        raise InputError(
            "the checkpoint is of a different kind",
            expected=format,
            found=kind,
            where=source,
            hint=f"convert it with {kind}->{backend.FRAMEWORK}",
            command=("convert", f"{kind}->{backend.FRAMEWORK}", str(source), str(run_dir)),
        )
    opened = open_foreign(format, source)
    result = run_dir / backend.FRAMEWORK / "checkpoints" / "0"
    if checkpoint_steps(result.parent):
        raise InputError(
            "the run directory already has checkpoints", where=result.parent, hint="use a different run directory"
        )
    weights = read_weights(opened.config, opened.tensors())
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside)
        _copy_tokenizer(opened, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
        hashes["weights"] = hash_arrays(weights)
        config = _run_config(opened.config, run_dir)
        with (
            RunDirectory(run_dir, config).opened(folder, hashes),
            CheckpointWriter(result.parent, in_background=False) as writer,
        ):

            def start_payload(partial_folder: Path) -> Callable[[], None]:
                return partial(backend.write_payload, partial_folder, config, TrainingState(weights, {}, {}))

            info, n_bytes = CheckpointInfo(backend.FRAMEWORK, 0, 0, config, hashes, format), payload_bytes(weights)
            writer.save(info, folder, start_payload, n_bytes=n_bytes)
    n_params = count_params(opened.config)
    logger.info(f"imported {source}: {len(weights)} weights, {n_params:,} parameters")
    return result


def _copy_tokenizer(opened: HFCheckpoint | OriginalCheckpoint | GGUFCheckpoint, folder: Path) -> None:
    """Writes the tokenizer's files into an empty folder. Warns if this project cannot use them."""
    try:
        opened.write_tokenizer(folder)
        if contradicting(folder):
            logger.warning(
                "tokenizer.json and tokenizer.model give different ids: using tokenizer.json, as transformers does"
            )
            (folder / TOKENIZER_MODEL).unlink()
        load_tokenizer(folder, opened.config.vocab_size)
    except InputError as error:
        problem = str(error).replace(str(folder), str(opened.folder))
        logger.warning(f"the tokenizer cannot be used, so the model can continue token ids but not text: {problem}")


def _run_config(model: ModelConfig, run_dir: Path) -> RunConfig:
    """A run configuration for the model. All other settings come from the smallest preset; only training uses them."""
    preset = load_config("quickstart")
    train = replace(
        preset.train,
        out_dir=str(run_dir),
        seq_len=min(preset.train.seq_len, model.context_length),
        compute_dtype="float32",
    )
    return replace(preset, model=model, train=train)
