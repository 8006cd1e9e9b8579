"""What a run needs from its data: one folder, or a mixture of several."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minillm_core.data.batches import Batch, Rows

ALL_ROWS = slice(None)


class TrainingData(ABC):
    """Batches as a pure function of (seed, step).

    There is no iterator state: a resumed run asks for the batch of its next step.
    """

    dir: Path
    """The folder of the tokenizer."""
    vocab_size: int
    document_mask: bool
    """The documents in a row do not see each other."""
    is_chat: bool
    """Only the tokens of the assistant's replies count (in a mixture: of those folders that have conversations)."""

    @abstractmethod
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the tokenizer and of the tokens, which identify this data."""

    @abstractmethod
    def verify(self) -> None:
        """Compares the files with their hashes.

        Raises:
            InputError: a file was changed after it was prepared.
        """

    @abstractmethod
    def n_tokens(self, split: str) -> int: ...

    @abstractmethod
    def targets_of_parts(self, split: str) -> dict[str, int]:
        """The number of predicted tokens that count in each folder of a mixture, by its name; one folder has an empty
        name."""

    @abstractmethod
    def tokens_per_byte(self, split: str) -> float | None:
        """Predicted tokens per byte of the split's text: the factor from nats per token to nats per byte. None if the
        size of the text is not known, or if only a part of it counts."""

    @abstractmethod
    def eval_batches(self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None) -> Iterator[Batch]:
        """Every token of a split that counts predicted once (of text, every token except the first); or about
        `n_batches` spread evenly over the split."""

    @abstractmethod
    def n_eval_batches(self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None) -> int:
        """The number of batches that `eval_batches` gives."""

    @abstractmethod
    def eval_parts(
        self, split: str, batch_size: int, seq_len: int, n_batches: int | None = None
    ) -> dict[str, Iterator[Batch]]:
        """The batches of `eval_batches` of each folder of a mixture, by its name; one folder has an empty name."""

    @abstractmethod
    def train_rows(self, numbers: np.ndarray, batch_size: int, seq_len: int, seed: int) -> Rows:
        """Rows of seq_len + 1 tokens by their numbers, which count the rows of all batches."""

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int, rows: slice = ALL_ROWS) -> Batch:
        """The training batch of one step, (batch_size, seq_len).

        Args:
            rows: the rows of the batch to return, for example those of one of several processes.
        """
        numbers = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
        return Batch.from_prepared(self.train_rows(numbers, batch_size, seq_len, seed))
