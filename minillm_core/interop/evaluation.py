"""Evaluates a checkpoint on prepared data: the numbers that `evaluate` prints and that a model card shows."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from minillm_core.data.mixture import Mixture
from minillm_core.data.prepared import PreparedData
from minillm_core.data.run_data import open_data
from minillm_core.data.split_loss import SplitLoss
from minillm_core.decoding.scoring import score_split
from minillm_core.files import as_text
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training import metrics
from minillm_core.training.backend import Backend
from minillm_core.training.checkpoints import read_info

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The loss of a checkpoint over every token of a split that counts, and how it was computed. Nothing precedes the
    first token (of each folder of a mixture; with a document mask, of each document), so it is not predicted."""

    data: str
    """Name of the text: its corpus, or its folder if it was not prepared from a corpus."""
    is_run_data: bool
    """It is the data of the run, not a folder that was given instead."""
    split: str
    loss: SplitLoss
    n_targets: int
    """Tokens that were predicted."""
    tokens_per_byte: float | None
    """Predicted tokens per byte of the text; None if its size is not known, or if only a part of it counts."""
    seq_len: int
    """Tokens per window; each window starts without context."""
    document_mask: bool
    """Documents in a window do not see each other."""
    is_chat: bool
    """Only the tokens of the assistant's replies were counted (in a mixture: of the folders with conversations)."""
    dtype: str
    """Of the parameters and the computation."""

    @property
    def perplexity(self) -> float:
        return metrics.perplexity(self.loss.mean)

    @property
    def bits_per_byte(self) -> float | None:
        """None if the size of the text is not known, or if only a part of it counts."""
        return None if self.tokens_per_byte is None else metrics.bits_per_byte(self.loss.mean, self.tokens_per_byte)


def evaluate_checkpoint(
    checkpoint: Path,
    backend: Backend,
    *,
    split: str = "val",
    data_dir: str | None = None,
    seq_len: int | None = None,
    dtype: str = "float32",
) -> Evaluation:
    """Evaluates a checkpoint on every token of a split that counts.

    Args:
        split: `train` or `val`.
        data_dir: a folder of prepared data; None: the data of the run.
        seq_len: tokens per window; each window starts without context. None: the run's seq_len.
        dtype: dtype of the parameters and the computation: float32, bfloat16 or float64.

    Raises:
        InputError: the data is missing or has a different tokenizer, seq_len is longer than the context, the checkpoint
            has no usable tokenizer, or the logits are not finite.
    """
    config = read_info(checkpoint).config
    given = None if data_dir is None else replace(config.data, dir=data_dir, mixture=None, mixture_changes=None)
    data = open_data(given or config.data, config.model.vocab_size)
    length = config.train.seq_len if seq_len is None else seq_len
    tokenizer = load_tokenizer(checkpoint, config.model.vocab_size)
    generator = backend.Generator(backend.load(checkpoint, dtype), tokenizer)
    parts = list(data.parts.values()) if isinstance(data, Mixture) else [data]
    where = ", ".join(str(part.dir) for part in parts)
    logger.info(f"evaluating {checkpoint} on {where}, split {split}, {backend.describe_device()}")
    loss = score_split(generator, data, split, length)
    return Evaluation(
        data=", ".join(data.parts) if isinstance(data, Mixture) else _name(data),
        is_run_data=data_dir is None,
        split=split,
        loss=loss,
        n_targets=sum(data.targets_of_parts(split).values()),
        tokens_per_byte=data.tokens_per_byte(split),
        seq_len=length,
        document_mask=data.document_mask,
        is_chat=data.is_chat,
        dtype=dtype,
    )


def _name(data: PreparedData) -> str:
    """The name of the corpus or of the folder. A model card is public, so it leaves out the rest of the path."""
    place = data.index.get("corpus") or data.dir
    return as_text(Path(place).absolute().name)
