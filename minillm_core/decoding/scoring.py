"""The loss of a model on a prepared split, by scoring every token of it."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from minillm_core.data.batches import Batch
from minillm_core.data.split_loss import SplitLoss
from minillm_core.data.training_data import TrainingData
from minillm_core.decoding.generation import SCORE_TOKENS, BaseGenerator, bucket
from minillm_core.errors import InputError
from minillm_core.progress import Work, progress
from minillm_core.text.tokenizer import hash_tokenizer


def score_split(generator: BaseGenerator, data: TrainingData, split: str, seq_len: int) -> SplitLoss:
    """The loss over every token of a split that counts: of text, all but the first.

    Args:
        split: `train` or `val`.
        seq_len: tokens per window; each window starts without context.

    Raises:
        InputError: the data was made with a different tokenizer, or seq_len is longer than the context.
    """
    if hash_tokenizer(generator.tokenizer.path.parent) != data.hashes()["tokenizer"]:
        raise InputError(
            "the tokenizer of the data differs from the model's",
            where=f"{data.dir / 'tokenizer.model'} and {generator.tokenizer.path}",
            hint="prepare the data with the run's configuration",
        )
    limit = generator.config.context_length
    if not 1 <= seq_len <= limit:
        raise InputError("seq_len is out of range", expected=f"1 to {limit}, the context length", found=seq_len)
    n_targets = data.targets_of_parts(split)
    parts = data.eval_parts(split, max(1, SCORE_TOKENS // bucket(seq_len, limit)), seq_len)
    with progress("evaluating", sum(n_targets.values()), "token") as work:
        sums = {name: _sums(generator, batches, work) for name, batches in parts.items()}
    return SplitLoss.of(sums, n_targets)


def _sums(generator: BaseGenerator, batches: Iterator[Batch], work: Work) -> tuple[float, int]:
    """The loss of all targets with a weight, and their number."""
    sums, n_scored = [], 0
    for batch in batches:
        texts, counts = [], []
        for b in range(len(batch.tokens_BT)):
            for part in _documents(batch, b):
                is_counted = batch.weights_BT[b, part] > 0
                if is_counted.any():
                    n = int(np.flatnonzero(is_counted)[-1]) + 1  # what follows the last of them is not needed
                    texts.append([*batch.tokens_BT[b, part][:n], batch.targets_BT[b, part][n - 1]])
                    counts.append(is_counted[:n])
        scores = np.concatenate(generator.score(texts))[np.concatenate(counts)]
        sums.append(float(scores.sum(dtype=np.float64)))
        n_scored += len(scores)
        work.advance(len(scores))
    return -math.fsum(sums), n_scored


def _documents(batch: Batch, row: int) -> list[slice]:
    """The parts of a row that see each other: the whole row or, with a document mask, each of its documents."""
    T = batch.tokens_BT.shape[1]
    edges = [] if batch.segments_BT is None else (np.flatnonzero(np.diff(batch.segments_BT[row])) + 1).tolist()
    return [slice(a, b) for a, b in pairwise([0, *edges, T])]
