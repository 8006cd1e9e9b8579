"""Checkpoints of other projects made into runs."""

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
from minillm_core.model.params import count_params
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
from minillm_core.training.run_directory import open_run

logger = logging.getLogger(__name__)

OPENERS: dict[str, Callable[[Path], HFCheckpoint | OriginalCheckpoint | GGUFCheckpoint]] = {
    "hf": open_hf,
    "minillm": open_original,
    "gguf": open_gguf,
}
"""By format: what looks at a checkpoint without reading its weights."""


def import_checkpoint(format: str, source: Path, run_dir: Path, backend: Backend) -> Path:
    """Makes a run with one checkpoint, of step 0, from another project's checkpoint.

    Weights are kept as float32 (float64 ones as they are). The tokenizer files beside them go along as they are.

    Args:
        format: `hf`: a Hugging Face folder; `minillm`: the original Mini-LLM's ckpt.pt or folder; `gguf`: a file.

    Returns:
        the new checkpoint.

    Raises:
        InputError: the source is damaged or has what the architecture cannot express, or the run directory holds
            something else. Nothing is written then.
    """
    kind = foreign_kind(source)
    if kind not in (None, format) and (format, kind) != ("minillm", "hf"):  # the original's config.json may be bare
        raise InputError(
            "a checkpoint of a different kind",
            expected=format,
            found=kind,
            where=source,
            hint=f"convert it with {kind}->{backend.FRAMEWORK}",
            command=("convert", f"{kind}->{backend.FRAMEWORK}", str(source), str(run_dir)),
        )
    opened = OPENERS[format](source)
    result = run_dir / backend.FRAMEWORK / "checkpoints" / "0"
    if checkpoint_steps(result.parent):
        raise InputError("the run has checkpoints of its own", where=result.parent, hint="give another run directory")
    weights = dict(opened.tensors())
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside)
        _copy_tokenizer(opened, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
        hashes["weights"] = hash_arrays(weights)
        config = _run_config(opened.config, run_dir)
        with open_run(run_dir, config, folder, hashes), CheckpointWriter(result.parent) as writer:

            def start_payload(partial_folder: Path) -> Callable[[], None]:
                return partial(backend.write_payload, partial_folder, config, TrainingState(weights, {}, {}))

            info, n_bytes = CheckpointInfo(backend.FRAMEWORK, 0, 0, config, hashes, format), payload_bytes(weights)
            writer.save(info, folder, start_payload, n_bytes=n_bytes)
    n_params = count_params(opened.config)
    logger.info("imported %s: %d weights, %s parameters", source, len(weights), f"{n_params:,}")
    return result


def _copy_tokenizer(opened: HFCheckpoint | OriginalCheckpoint | GGUFCheckpoint, folder: Path) -> None:
    """Writes the tokenizer's files into an empty folder; warns if they cannot be used here."""
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
        logger.warning("its tokenizer cannot be used, so the model continues token ids, not text: %s", problem)


def _run_config(model: ModelConfig, run_dir: Path) -> RunConfig:
    """The model under the training settings of the smallest preset, which nothing but further training would use."""
    preset = load_config("quickstart")
    train = replace(
        preset.train,
        out_dir=str(run_dir),
        seq_len=min(preset.train.seq_len, model.context_length),
        compute_dtype="float32",
    )
    return replace(preset, model=model, train=train)
