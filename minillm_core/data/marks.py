"""The marks of conversations: one byte for each token, in a file beside the token file.

From them come the rows of a batch. A row has whole conversations, as many as fit, so that no reply is separated from
its question; only a conversation that is longer than a row is continued in the next rows.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm_core.data.token_files import TokenFiles
from minillm_core.progress import progress

COUNTED, FIRST = 1, 2
"""The bits of a mark: the token counts in the loss; it is the first of a conversation. A first token never counts:
nothing precedes it."""
SCANNED = 1 << 24
"""Marks that are read at a time."""


def marks_path(tokens: Path) -> Path:
    """The file with the marks of a token file."""
    return tokens.with_suffix(".marks")


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of a split begin and stop. The first token of a row is context only, the last one a target."""

    starts: np.ndarray
    stops: np.ndarray


def pack_rows(marks: TokenFiles, seq_len: int) -> PackedRows:
    """The rows of a split, in order, at most seq_len + 1 tokens each. Those in which no token counts are left out, so
    that every batch has a loss. Every token that counts is the target of exactly one row."""
    firsts = [np.empty(0, np.int64)]
    with progress("looking at the conversations", 2 * len(marks), "token") as work:
        for at in range(0, len(marks), SCANNED):
            part = marks[at : at + SCANNED]
            firsts.append(at + np.flatnonzero(part & FIRST))
            work.advance(len(part))
        ends = np.append(np.concatenate(firsts)[1:], len(marks))
        starts, stops = _cut(ends, seq_len)
        is_used = np.zeros(len(starts), bool)
        for at in range(0, len(marks), SCANNED):
            part = marks[at : at + SCANNED]
            counted = at + np.flatnonzero(part & COUNTED)
            is_used[np.searchsorted(starts, counted) - 1] = True  # the row that begins before the token
            work.advance(len(part))
    return PackedRows(starts[is_used], stops[is_used])


def _cut(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops of rows.

    Args:
        ends: for each conversation, the number of tokens up to its end.
    """
    starts, stops, start = [], [], 0
    while start < ends[-1]:
        limit = start + seq_len + 1
        n_fit = int(np.searchsorted(ends, limit, side="right"))
        stop = int(ends[n_fit - 1]) if n_fit else 0
        starts.append(start)
        if stop > start:
            stops.append(stop)
            start = stop
        else:  # the conversation goes on after the row: the last target is the first token of the next row
            stops.append(limit)
            start = limit - 1
    return np.array(starts, np.int64), np.array(stops, np.int64)
