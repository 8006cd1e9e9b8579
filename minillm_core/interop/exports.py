"""Exports: writes a checkpoint of a run as a Hugging Face folder or a GGUF file."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.files import refuse_existing, written_aside
from minillm_core.interop.evaluation import Evaluation
from minillm_core.interop.gguf import write_gguf
from minillm_core.interop.gguf_tokenizer import NO_TOKENIZER, tokenizer_fields
from minillm_core.interop.hf import write_hf_weights
from minillm_core.interop.hf_config import to_hf_config
from minillm_core.interop.model_card import model_card, model_name
from minillm_core.tensors import LazyTensors
from minillm_core.text.tokenizer import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    Tokenizer,
    copy_tokenizer,
    read_generation_config,
    read_tokenizer_config,
)
from minillm_core.text.tokenizer_json import load_tokenizer, sentencepiece_to_json, special_tokens
from minillm_core.training.backend import Backend
from minillm_core.training.checkpoints import CheckpointInfo, read_info, verify_checkpoint

logger = logging.getLogger(__name__)


def _open_export(checkpoint: Path, destination: Path, backend: Backend) -> tuple[CheckpointInfo, LazyTensors]:
    """Opens a checkpoint for export. Raises InputError if it is damaged, or if the destination already exists."""
    refuse_existing(destination)
    verify_checkpoint(checkpoint)
    info = read_info(checkpoint)
    return info, backend.open_weights(checkpoint, info.config)


def export_hf(
    checkpoint: Path,
    folder: Path,
    backend: Backend,
    dtype: str,
    *,
    evaluation: Evaluation | None = None,
    repo: str | None = None,
) -> Path:
    """Writes a checkpoint as a Hugging Face folder: config.json, weights, tokenizer, model card, loss curve.

    Args:
        dtype: precision of the weights: float32, bfloat16, float16 or float64.
        evaluation: a result for the model card.
        repo: the repository OWNER/NAME that the model card tells how to load.

    Raises:
        InputError: the folder exists, or the checkpoint is damaged.
    """
    info, weights = _open_export(checkpoint, folder, backend)
    model = info.config.model
    with written_aside(folder) as beside:
        beside.mkdir()
        write_hf_weights(beside, model, weights, dtype)
        copy_tokenizer(checkpoint, beside)
        ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        try:
            ids = _write_tokenizer(beside, load_tokenizer(checkpoint, model.vocab_size), model)
        except InputError as error:
            logger.warning(f"this project cannot use the tokenizer; its files are copied unchanged: {error}")
        known = read_generation_config(beside)
        ids |= {key: known[key] for key in ids if key in known}
        _write_json(beside / GENERATION_CONFIG, known or ids)
        _write_json(beside / "config.json", to_hf_config(model, dtype) | ids)
        curve = checkpoint.parent.parent / "loss.png"
        if curve.is_file():
            shutil.copyfile(curve, beside / "loss.png")
        card = model_card(checkpoint, info, dtype, curve.is_file(), evaluation=evaluation, repo=repo)
        (beside / "README.md").write_text(card, encoding="utf-8", errors="replace")  # a path need not be valid UTF-8
    logger.info(f"exported {checkpoint}: {len(weights)} weights in {dtype}")
    return folder


def export_gguf(checkpoint: Path, file: Path, backend: Backend, dtype: str) -> Path:
    """Writes a checkpoint as a GGUF file for llama.cpp, including its tokenizer.

    Args:
        dtype: precision of the matrices: float32, bfloat16, float16 or q8_0. Norms are float32.

    Raises:
        InputError: the file exists, or the checkpoint is damaged.
    """
    info, weights = _open_export(checkpoint, file, backend)
    model = info.config.model
    fields: dict[str, Any] = {"general.name": model_name(info), **NO_TOKENIZER}
    try:
        fields |= tokenizer_fields(load_tokenizer(checkpoint, model.vocab_size), model.vocab_size)
    except InputError as error:
        logger.warning(f"the tokenizer is left out: {error}")
    with written_aside(file) as beside:
        kept = write_gguf(beside, model, weights, dtype, fields)
    if kept:
        logger.warning(
            f"q8_0 needs rows of a multiple of 32 values: {len(kept)} matrices are float16, for example {kept[0]}"
        )
    logger.info(f"exported {checkpoint}: {len(weights)} weights in {dtype}")
    return file


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, model: ModelConfig) -> dict[str, int | None]:
    """Adds tokenizer.json, and settings for it, if there is only a SentencePiece model. Returns the special ids."""
    found = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ids = {key: i if i >= 0 else None for key, i in found.items()} | {"pad_token_id": None}
    if (folder / "tokenizer.json").is_file():
        return ids
    data = sentencepiece_to_json(tokenizer.content, tokenizer.adds_bos)
    if data is None:
        logger.warning("tokenizer.json cannot express this kind of tokenizer: only tokenizer.model is exported")
        return ids
    settings: dict[str, object] = dict(special_tokens(tokenizer.content))
    settings |= {"model_max_length": model.context_length, "clean_up_tokenization_spaces": False}
    settings["split_special_tokens"] = True  # "</s>" in a text is ordinary text, as in training
    _write_json(folder / "tokenizer.json", data)
    # PreTrainedTokenizerFast uses tokenizer.json unchanged
    settings |= read_tokenizer_config(folder) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(folder / TOKENIZER_CONFIG, settings)
    return ids | {"pad_token_id": data["model"]["vocab"].get(settings.get("pad_token"))}


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
