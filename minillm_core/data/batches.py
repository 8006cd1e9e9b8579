"""The batch of a step: tokens, targets, weights, positions, documents."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.tensors import Array


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of T + 1 tokens, before they are divided into inputs and targets: all (B, T + 1)."""

    tokens: np.ndarray
    """int32."""
    counts: np.ndarray
    """Whether a token counts as a target, bool."""
    begins: np.ndarray | None
    """Whether a token is the first of its document, bool. None: documents in a row are not told apart."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens, the token that each must predict, and how much each prediction counts: all (B, T).

    On the host the arrays are numpy's; each framework copies them to its device. All batches of a run should have the
    same optional fields: JAX compiles the step anew for every combination.
    """

    tokens_BT: Array
    """Token ids, int32."""
    targets_BT: Array
    """The token that follows each, int32."""
    weights_BT: Array
    """The factor of each target's loss, float32. The loss of a batch is the weighted mean. 0 leaves a target out of it,
    but its loss must be finite too."""
    positions_BT: Array | None = None
    """The position of each token in its document, int32. None: 0 to T - 1 in every row."""
    segments_BT: Array | None = None
    """The document of each token, int32. Tokens of one row that are in different segments do not see each other. None:
    every row is one document. Give weight 0 to a target that is the first token of the next document."""

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> "Batch":
        """From rows of T + 1 tokens: each but the first is predicted from those before it, all with weight 1."""
        return cls(rows[:, :-1], rows[:, 1:], np.ones((len(rows), rows.shape[1] - 1), np.float32))

    @classmethod
    def packed(cls, rows: np.ndarray, end_id: int) -> "Batch":
        """From rows of T + 1 tokens with several documents, each of which ends with `end_id`.

        Documents do not see each other, positions start again in each, and the first token of a document is not
        predicted from the one before it. A document that continues from before the row begins with position 0.
        """
        return cls.of_documents(rows, begin_after(rows, end_id))

    @classmethod
    def of_documents(cls, rows: np.ndarray, begins: np.ndarray) -> "Batch":
        """`packed`, for documents that begin where `begins` (B, T + 1) is true."""
        tokens_BT, begins_BT = rows[:, :-1], begins[:, :-1].copy()
        begins_BT[:, 0] = False
        segments_BT = np.cumsum(begins_BT, axis=1, dtype=np.int32)
        at_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
        positions_BT = at_T - np.maximum.accumulate(np.where(begins_BT, at_T, 0), axis=1)
        return cls(tokens_BT, rows[:, 1:], (~begins[:, 1:]).astype(np.float32), positions_BT, segments_BT)

    @classmethod
    def from_prepared(cls, rows: Rows) -> "Batch":
        """From rows of prepared data: only the tokens that count have a weight and, if the documents of a row are told
        apart, they do not see each other."""
        batch = cls.from_rows(rows.tokens) if rows.begins is None else cls.of_documents(rows.tokens, rows.begins)
        return dataclasses.replace(batch, weights_BT=np.where(rows.counts[:, 1:], batch.weights_BT, np.float32(0)))

    @classmethod
    def from_tokens(cls, tokens_BT: np.ndarray) -> "Batch":
        """From rows of T tokens: each token predicts the next one, the last one of a row nothing (its weight is 0)."""
        weights_BT = np.ones(tokens_BT.shape, np.float32)
        weights_BT[:, -1] = 0
        return cls(tokens_BT, np.roll(tokens_BT, -1, axis=1), weights_BT)

    def check(self, config: ModelConfig, n_micro: int = 1) -> None:
        """Checks a batch on the host, before it is used in n_micro parts.

        Raises:
            InputError: shapes or dtypes do not fit; ids outside the vocabulary; positions outside the context; weights
                that are negative, not finite in float32, or all zero.
        """
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {name: np.asarray(array) for name, array in given.items() if array is not None}
        shape = arrays["tokens_BT"].shape
        for name, array in arrays.items():
            dtype, words = (np.floating, "floats") if name == "weights_BT" else (np.integer, "integers")
            if array.shape != shape or array.ndim != 2 or not np.issubdtype(array.dtype, dtype):
                expected = f"{words} (B, T)" if len(shape) != 2 else f"{words} (B, T) = {shape}"
                found = f"{array.dtype} {array.shape}"
                raise InputError(f"{name} does not fit the batch", expected=expected, found=found)
        if shape[0] % n_micro:
            problem = "the rows of the batch cannot be divided into micro-batches"
            raise InputError(problem, expected=f"a multiple of train.grad_accum, {n_micro}", found=f"{shape[0]} rows")
        limits = {"tokens_BT": (0, config.vocab_size), "targets_BT": (0, config.vocab_size)}
        limits |= {"positions_BT": (0, config.context_length), "segments_BT": (-(1 << 31), 1 << 31)}
        for name, (least, limit) in limits.items():
            if name in arrays and arrays[name].size and not least <= arrays[name].min() <= arrays[name].max() < limit:
                found = f"{arrays[name].min()} to {arrays[name].max()}"
                hint = "to leave out a target, give it the weight 0 and any valid id" if "targets" in name else None
                raise InputError(f"{name} is out of range", expected=f"{least} to {limit - 1}", found=found, hint=hint)
        with np.errstate(over="ignore"):
            weights_BT = arrays["weights_BT"].astype(np.float32)
            total = weights_BT.sum()
        if not (np.isfinite(total) and total > 0 and weights_BT.min() >= 0):
            found = f"from {weights_BT.min(initial=np.inf)} to {weights_BT.max(initial=-np.inf)}, sum {total}"
            expected = "finite numbers of 0 or more, not all 0 (in float32)"
            raise InputError("weights_BT is out of range", expected=expected, found=found)


def begin_after(rows: np.ndarray, end_id: int) -> np.ndarray:
    """Where documents begin in rows of tokens: after each `end_id`."""
    begins = np.zeros(rows.shape, bool)
    begins[:, 1:] = rows[:, :-1] == end_id
    return begins
