"""What a preparation does, and how its inputs are divided into tasks."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from minillm_core.data.assemble import Holdout
from minillm_core.data.chunks import CHUNK_BYTES
from minillm_core.data.documents import PLAIN, Format, Piece
from minillm_core.data.encode import LAST
from minillm_core.data.pieces import is_stream, pieces_of
from minillm_core.data.sources import Source
from minillm_core.data.workers import Task
from minillm_core.errors import InputError
from minillm_core.progress import steps
from minillm_core.text.tokenizer import hash_tokenizer
from minillm_core.version import __version__

FORMAT_VERSION, CHAT_FORMAT_VERSION = 2, 3
"""Of documents, and of conversations: a version that does not know their marks must not train on all their tokens."""
TASK_BYTES = (4 << 20, 16 << 20)
"""Bounds for the text of one task. Larger inputs have larger tasks, so that there are not too many."""
GROUPED = 10_000
"""Small files of one task."""
DEFAULT_HOLDOUT = Holdout(share=0.01)


@dataclass(frozen=True)
class Plan:
    """What a preparation does."""

    sources: tuple[Source, ...]
    tokenizer: Path
    """A folder with a tokenizer's files."""
    vocab_size: int
    how: Format = PLAIN
    holdout: Holdout = DEFAULT_HOLDOUT
    drop_duplicates: bool = False
    skip_bad: bool = False
    part: tuple[int, int] = (0, 1)
    """(i, n): only the i-th of n parts, counted from 0."""
    about: tuple[tuple[str, Any], ...] = ()
    """More entries of the index."""


def settings_of(plan: Plan) -> dict[str, Any]:
    """The plan as JSON, without the places of its files: the parts of two machines must have the same."""
    sources = []
    for s in steps(plan.sources, "looking at the inputs", "file"):
        ends = (s.n_bytes, s.path.name, s.ends_hash())
        sources.append([s.format, s.compression, s.start, s.stop, s.split, s.origin, *ends])
    return {
        "version": [FORMAT_VERSION, __version__, sentencepiece.__version__],
        "task_bytes": [task_bytes(plan), CHUNK_BYTES],
        "tokenizer": hash_tokenizer(plan.tokenizer),
        "vocab_size": plan.vocab_size,
        "text_field": plan.how.text_field,
        "separator": plan.how.separator.decode("utf-8", "surrogateescape"),
        "chat": plan.how.chat,
        "holdout": dataclasses.asdict(plan.holdout),
        "drop_duplicates": plan.drop_duplicates,
        "skip_bad": plan.skip_bad,
        "sources": sources,
    }


def plan_of(settings: dict[str, Any], folder: Path) -> Plan:
    """The plan of a part, from its settings."""
    sources = zip(settings["paths"], settings["sources"], strict=True)
    return Plan(
        tuple(Source(Path(path), *source[:6]) for path, source in sources),
        folder / "tokenizer",
        settings["vocab_size"],
        Format(settings["text_field"], settings["separator"].encode("utf-8", "surrogateescape"), settings["chat"]),
        Holdout(**settings["holdout"]),
        settings["drop_duplicates"],
        settings["skip_bad"],
    )


def task_bytes(plan: Plan) -> int:
    n_bytes = sum(source.n_bytes for source in plan.sources)
    return min(max(n_bytes // 4096 // CHUNK_BYTES * CHUNK_BYTES, TASK_BYTES[0]), TASK_BYTES[1])


def dtype_of(plan: Plan) -> str:
    return "<u2" if plan.vocab_size <= 1 << 16 else "<u4"


def tasks(plan: Plan, folder: Path, bad_sources: list[dict[str, Any]]) -> Iterator[Task]:
    """The tasks of this part of the plan, each with the path of its block. Sorted, they have the order of the text.

    Args:
        bad_sources: sources that cannot be read are added here, if the plan skips them.
    """
    size, (i, n) = task_bytes(plan), plan.part
    group: list[Piece] = []
    first, unit, n_bytes = (0, 0), 0, 0
    for index, source in enumerate(plan.sources):
        pieces = pieces_of(index, source, plan.how, size)
        number = 0
        try:
            while (piece := next(pieces, None)) is not None:
                if piece.chunks is not None or piece.lines is not None:
                    # A source that can only be read from its beginning belongs to one machine.
                    if group:
                        if unit % n == i:
                            yield folder / block_name(*first), tuple(group)
                        group, unit, n_bytes = [], unit + 1, 0
                    if unit % n != i:
                        break
                    yield folder / block_name(index, number), (piece,)
                else:
                    first = first if group else (index, number)
                    group.append(piece)
                    n_bytes += piece.n_bytes
                    if n_bytes >= size or len(group) >= GROUPED:
                        if unit % n == i:
                            yield folder / block_name(*first), tuple(group)
                        group, unit, n_bytes = [], unit + 1, 0
                number += 1
        except InputError as error:
            if not plan.skip_bad:
                raise
            if (unit % n if is_stream(source, plan.how) else 0) == i:  # one part reports it
                bad_sources.append({"where": str(source.path), "problem": " ".join(str(error).split())})
        if is_stream(source, plan.how):
            unit += 1
    if group and unit % n == i:
        yield folder / block_name(*first), tuple(group)


def block_name(source: int, number: int) -> str:
    return f"{source:08}-{number:08}-{LAST}"
