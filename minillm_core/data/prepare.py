"""Prepares raw text once: trains the tokenizer and writes the token files."""

import contextlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.config import DataConfig
from minillm_core.data.batches import FORMAT_VERSION, SPLITS, PreparedData, redo_hint
from minillm_core.data.corpus import Document, digest_of_places, digest_of_text, list_documents
from minillm_core.errors import InputError
from minillm_core.files import (
    beside,
    commit_folder,
    hash_file,
    lock,
    make_folder,
    named_if_it_fails,
    real_path,
    replace_file,
)
from minillm_core.text.tokenizer import Tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

LINE_PARTS = re.compile(r"(?s).{1,65536}(?= |\Z)|.{1,65536}")
"""A line as the tokenizer is trained on it: in parts of at most 64 Ki characters, cut before spaces. (SentencePiece
leaves out longer lines.)"""


def open_or_prepare(config: DataConfig, vocab_size: int) -> PreparedData:
    """The prepared data of a corpus. Prepares it if it is missing, then compares every file with its hash.

    Raises:
        InputError: the corpus is unusable, the folder holds different data, or a file was changed.
    """
    is_new = prepare_data(config, vocab_size)
    logger.info(f"prepared {config.corpus} in {config.dir}" if is_new else f"found prepared data in {config.dir}")
    data = PreparedData(config.dir, vocab_size)
    data.verify()
    return data


def prepare_data(config: DataConfig, vocab_size: int) -> bool:
    """Trains the tokenizer and packs the corpus into `config.dir`, unless this has been done before.

    Every document becomes BOS, its tokens, EOS. The folder appears only when it is complete.

    Returns:
        True if the data was prepared now, False if it existed.

    Raises:
        InputError: the corpus is unusable, or the folder holds different data.
    """
    target = Path(config.dir)
    if _is_prepared(target, config, vocab_size):
        return False
    documents = list_documents(config)
    partial = beside(target, "partial")
    make_folder(partial.parent)
    with lock(beside(target, "lock"), wait=True):
        if _is_prepared(target, config, vocab_size):
            return False
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with named_if_it_fails(target):
                _pack(documents, config, vocab_size, partial)
            commit_folder(partial, real_path(target))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return True


def _is_prepared(target: Path, config: DataConfig, vocab_size: int) -> bool:
    """Whether the folder holds the prepared data of this corpus.

    Raises:
        InputError: the folder holds different data.
    """
    if not target.exists():
        return False
    existing = PreparedData(target, vocab_size).meta
    if existing.get("holdout_every") != config.holdout_every:
        raise InputError(
            "the folder was prepared with a different holdout_every",
            expected=config.holdout_every,
            found=existing.get("holdout_every"),
            where=target,
            hint=redo_hint(target),
        )
    if not _has_text_of(target, existing, config):
        raise InputError(
            "the folder was prepared from a different corpus, or the corpus has changed since",
            expected=f"the present text of {config.corpus}",
            found=f"{sum(existing[split]['n_bytes'] for split in SPLITS):,} bytes, from {existing.get('corpus')}",
            where=target,
            hint="to go on with runs that use this data, restore the text; for the present text, choose a different "
            "--data.dir (and, to train, a different --train.out_dir)",
        )
    return True


def _has_text_of(target: Path, meta: dict[str, Any], config: DataConfig) -> bool:
    """Whether data was prepared from the text that the corpus has now, whatever the spelling of its path."""
    if config.corpus != "sotu" and not Path(config.corpus).exists() and config.corpus == meta.get("corpus"):
        logger.info(f"the corpus {config.corpus} is not there any more; its prepared data is used")
        return True
    documents = list_documents(config)
    if "corpus_sha256" not in meta:  # prepared by version 0.1
        n_bytes = {split: sum(d.stop - d.start for d in documents if d.split == split) for split in SPLITS}
        return n_bytes == {split: meta[split]["n_bytes"] for split in SPLITS}
    if (places := digest_of_places(documents)) == meta.get("corpus_places"):
        return True
    if digest_of_text(documents) != meta["corpus_sha256"]:
        return False
    with contextlib.suppress(OSError):  # a folder that is only read
        replace_file(target / "meta.json", json.dumps(meta | {"corpus_places": places}, indent=1) + "\n")
    return True


def _pack(documents: list[Document], config: DataConfig, vocab_size: int, folder: Path) -> None:
    """Writes tokenizer.model, the token files and meta.json."""
    train_texts = (text for document in documents if document.split == "train" for text in document.chunks())
    lines = (part for text in train_texts for line in text.split("\n") for part in LINE_PARTS.findall(line))
    train_tokenizer(lines, vocab_size, folder / "tokenizer.model")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    meta: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "corpus": config.corpus,
        "corpus_places": digest_of_places(documents),
        "corpus_sha256": digest_of_text(documents),
        "holdout_every": config.holdout_every,
        "vocab_size": vocab_size,
        "dtype": dtype.str,
        "tokenizer_sha256": hash_file(folder / "tokenizer.model"),
    }
    for split in SPLITS:
        n_tokens = n_bytes = 0
        with (folder / f"{split}.bin").open("wb") as file:
            for document in (document for document in documents if document.split == split):
                ids = [tokenizer.bos_id]
                for text in document.chunks():
                    for part in tokenizer.encode_many(re.findall(r"[^\n]*\n|[^\n]+", text)):
                        ids += part
                    file.write(np.array(ids, dtype).tobytes())
                    n_tokens += len(ids)
                    ids = []
                file.write(np.array([*ids, tokenizer.eos_id], dtype).tobytes())
                n_tokens += len(ids) + 1
                n_bytes += document.stop - document.start
        digest = hash_file(folder / f"{split}.bin")
        meta[split] = {"n_tokens": n_tokens, "n_bytes": n_bytes, "sha256": digest}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
