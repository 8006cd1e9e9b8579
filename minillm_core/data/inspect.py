"""What is in a folder of prepared data: sizes, lengths of documents, sources, samples, damage."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from minillm_core.data.assemble import DOCUMENT
from minillm_core.data.marks import COUNTED
from minillm_core.data.prepared import SPLITS, PreparedData
from minillm_core.errors import InputError
from minillm_core.files import hash_files
from minillm_core.text.tokenizer import Tokenizer, hash_tokenizer

SAMPLE_TOKENS = 80
"""Tokens of a sample of text."""
CHAT_SAMPLE_TOKENS = 400
"""Tokens of a sample of a conversation, which shows its replies."""


@dataclass(frozen=True)
class SplitReport:
    n_tokens: int
    n_bytes: int | None
    lengths: np.ndarray
    """Tokens of each document, with those that begin and end it; empty for data of version 0.1."""
    tokens_of_source: dict[str, int]
    samples: tuple[str, ...]
    """The beginnings of documents that are spread evenly over the split. Of conversations, what counts is between ⟦
    and ⟧."""
    n_counted: int | None
    """Tokens of conversations that count in the loss; None: the documents are text, and all count."""


@dataclass(frozen=True)
class DataReport:
    folder: Path
    splits: dict[str, SplitReport]
    damaged: tuple[Path, ...]
    """Files whose content differs from their hash."""
    n_skipped: int
    """Documents that could not be used when the data was prepared."""


def inspect_data(folder: str | Path, n_samples: int = 3) -> DataReport:
    """Reads a folder of prepared data and compares every file with its hash.

    Args:
        n_samples: documents of each split to decode.

    Raises:
        InputError: the folder is not one of prepared data, or files are missing or truncated.
    """
    if n_samples < 0:
        raise InputError("samples is out of range", expected="0 or more", found=n_samples)
    data = PreparedData(folder, None)
    hashes: dict[Path, str] = {}
    for name, split in data.splits.items():
        hashes |= split.hashed()
        if (digest := data.index[name].get("documents_sha256")) is not None:
            hashes[data.dir / f"{name}.documents"] = digest
    present = [path for path in hashes if path.is_file()]
    found = dict(zip(present, hash_files(present, "checking the data"), strict=True))
    damaged = [path for path, digest in hashes.items() if found.get(path) != digest]
    if hash_tokenizer(data.dir) != data.index["tokenizer_sha256"]:
        damaged.append(data.dir / "the tokenizer's files")
    splits = {split: _inspect_split(data, split, n_samples, damaged) for split in SPLITS}
    return DataReport(data.dir, splits, tuple(damaged), data.index.get("skipped", {}).get("n_documents", 0))


def _inspect_split(data: PreparedData, split: str, n_samples: int, damaged: Sequence[Path]) -> SplitReport:
    path = data.dir / f"{split}.documents"
    is_intact = path.is_file() and path not in damaged
    documents = np.memmap(path, DOCUMENT, mode="r") if is_intact else np.empty(0, DOCUMENT)
    stops = documents["stop"].astype(np.int64)
    starts = np.concatenate([[0], stops[:-1]]) if len(stops) else np.array([0])
    names = [source["path"] for source in data.index.get("sources", [])]
    counts = np.bincount(documents["source"].astype(np.int64), stops - starts[: len(stops)], minlength=len(names))
    chosen = starts[np.unique(np.linspace(0, len(starts) - 1, n_samples).astype(int))] if n_samples else []
    tokenizer, samples = data.tokenizer, []
    for start in map(int, chosen):
        stop = int(stops[np.searchsorted(stops, start, side="right")]) if len(stops) else data.n_tokens(split)
        samples.append(_sample(data, split, start, stop, tokenizer))
    own: dict[str, int] = {}
    for name, count in zip(names, counts.tolist(), strict=False):
        own[name] = own.get(name, 0) + int(count)  # a file that was cut into two sources
    return SplitReport(
        data.n_tokens(split),
        data.splits[split].n_bytes,
        stops - starts[: len(stops)],
        own,
        tuple(samples),
        data.n_targets(split) if data.is_chat else None,
    )


def _sample(data: PreparedData, split: str, start: int, stop: int, tokenizer: Tokenizer) -> str:
    """The beginning of the document start:stop."""
    if not data.is_chat:
        return tokenizer.decode(data.tokens[split][start : min(stop, start + SAMPLE_TOKENS)].tolist())
    stop = min(stop, start + CHAT_SAMPLE_TOKENS)
    ids, is_counted = data.tokens[split][start:stop], (data.marks[split][start:stop] & COUNTED) > 0
    edges = [0, *(np.flatnonzero(np.diff(is_counted)) + 1).tolist(), len(ids)]
    text = ""
    for first, last in pairwise(edges):
        part = tokenizer.decode_after(ids[first:last].tolist())
        text += f"⟦{part}⟧" if is_counted[first] else part
    return text


def plot_lengths(report: DataReport, picture: Path) -> None:
    """Draws histograms of the lengths of the documents, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    longest = max((split.lengths.max(initial=2) for split in report.splits.values()), default=2)
    bins = np.geomspace(1, longest + 1, 50).tolist()
    for name, split in report.splits.items():
        axes.hist(split.lengths, bins=bins, alpha=0.6, label=f"{name}: {len(split.lengths):,} documents")
    axes.set(xscale="log", yscale="log", xlabel="tokens of a document", ylabel="documents")
    axes.legend()
    figure.savefig(picture, format="png", dpi=120)
