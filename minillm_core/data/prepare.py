"""Raw text to prepared data, in two stages: encode every document, then assemble the shards.

The first stage writes a block for each task; a killed preparation goes on after the blocks that exist. What is in the
blocks depends only on the sources and the tokenizer, so the result is the same for any number of workers, and for any
number of machines whose parts are merged.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.data.assemble import DROPPED, TRAIN, VAL, Holdout, assign, write_shards
from minillm_core.data.chunks import CHUNK_BYTES
from minillm_core.data.documents import PLAIN, Format, Piece
from minillm_core.data.encode import Work, finished_blocks, read_block
from minillm_core.data.pieces import is_stream, pieces_of
from minillm_core.data.prepared import INDEX
from minillm_core.data.sources import Source
from minillm_core.data.workers import Task, encode_tasks
from minillm_core.errors import InputError
from minillm_core.files import beside, commit_folder, lock, make_folder, named_if_it_fails, real_path, refuse_existing
from minillm_core.text.tokenizer import copy_tokenizer, hash_tokenizer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
PLAN, PART = "plan.json", "part.json"
BLOCK_BYTES = (4 << 20, 64 << 20)
"""Bounds for the text of one task. Larger inputs have larger tasks, so that there are at most a few thousand."""
LISTED = 1000
"""Documents that cannot be used and are listed in the index."""

DEFAULT_HOLDOUT = Holdout(share=0.01)

Progress = Callable[[int, int], None]


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


def prepare(plan: Plan, out: Path, *, n_workers: int = 1, on_progress: Progress = lambda done, total: None) -> None:
    """Prepares the data of a plan in the new folder `out`, which appears only when it is complete.

    If an earlier call was killed, the same call continues its work.

    Args:
        n_workers: processes that encode text.
        on_progress: called with the number of bytes that were read from the sources, and of all their bytes.

    Raises:
        InputError: `out` exists; a source cannot be read, or a document in it (unless `skip_bad`); no document is left
            for one of the splits; an earlier call with a different plan was not finished.
    """
    if out.exists():  # of a process that was killed at the very end
        shutil.rmtree(beside(out, "partial"), ignore_errors=True)
    refuse_existing(out)
    if not plan.sources:
        raise InputError("no input", expected="files, folders or patterns")
    make_folder(beside(out, "partial").parent)
    with lock(beside(out, "lock")):
        refuse_existing(out)
        carry_out(plan, out, n_workers=n_workers, on_progress=on_progress)
        beside(out, "lock").unlink(missing_ok=True)


def carry_out(
    plan: Plan,
    out: Path,
    *,
    restart: bool = False,
    n_workers: int = 1,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """`prepare`, for a caller that holds the lock.

    Args:
        restart: remove the unfinished work of a different plan, instead of raising.
    """
    partial = beside(out, "partial")
    with named_if_it_fails(out):
        _begin(plan, partial, restart)
        problems = _encode(plan, partial, n_workers, on_progress)
        if plan.part != (0, 1):
            (partial / PART).write_text(json.dumps(problems), encoding="utf-8")
            commit_folder(partial, real_path(out))
        else:
            _assemble(plan, finished_blocks(partial / "blocks"), problems, partial / "data")
            commit_folder(partial / "data", real_path(out))
            shutil.rmtree(partial)


def _settings(plan: Plan) -> dict[str, Any]:
    """The plan as JSON, without the places of its files: the parts of two machines must have the same."""
    return {
        "tokenizer": hash_tokenizer(plan.tokenizer),
        "vocab_size": plan.vocab_size,
        "text_field": plan.how.text_field,
        "separator": plan.how.separator.decode("utf-8", "surrogateescape"),
        "holdout": dataclasses.asdict(plan.holdout),
        "drop_duplicates": plan.drop_duplicates,
        "skip_bad": plan.skip_bad,
        "sources": [[s.format, s.compression, s.start, s.stop, s.split, s.n_bytes] for s in plan.sources],
    }


def _plan_of(settings: dict[str, Any], folder: Path) -> Plan:
    """The plan of a part, from its settings."""
    sources = zip(settings["paths"], settings["sources"], strict=True)
    return Plan(
        tuple(Source(Path(path), *source[:5]) for path, source in sources),
        folder / "tokenizer",
        settings["vocab_size"],
        Format(settings["text_field"], settings["separator"].encode("utf-8", "surrogateescape")),
        Holdout(**settings["holdout"]),
        settings["drop_duplicates"],
        settings["skip_bad"],
    )


def _block_bytes(plan: Plan) -> int:
    n_bytes = sum(source.n_bytes for source in plan.sources)
    return min(max(n_bytes // 4096 // CHUNK_BYTES * CHUNK_BYTES, BLOCK_BYTES[0]), BLOCK_BYTES[1])


def _begin(plan: Plan, partial: Path, restart: bool) -> None:
    """Creates the folder of an unfinished preparation, or checks that the existing one belongs to this plan."""
    places = {"paths": [str(s.path) for s in plan.sources], "times": [s.stamp() for s in plan.sources]}
    settings = json.loads(json.dumps(_settings(plan) | {"part": plan.part} | places))
    path = partial / PLAN
    if path.is_file():
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in settings if found.get(name) != settings[name]]
        except (ValueError, AttributeError):
            differing = ["plan.json, which is damaged"]
        if not differing:
            return
        if not restart:
            hint = f"give the command that was interrupted, or remove {partial} to begin again"
            problem = "an unfinished preparation has a different " + ", ".join(differing)
            raise InputError(problem.replace("times", "text"), where=partial, hint=hint)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "blocks").mkdir(parents=True)
    (partial / "tokenizer").mkdir()
    copy_tokenizer(plan.tokenizer, partial / "tokenizer")
    path.write_text(json.dumps(settings), encoding="utf-8")


def _encode(plan: Plan, partial: Path, n_workers: int, on_progress: Progress) -> list[dict[str, Any]]:
    """Encodes all tasks that are not finished. Returns the documents that cannot be used."""
    work = Work(
        plan.sources,
        tuple(s.stamp() for s in plan.sources),
        plan.how,
        partial / "tokenizer",
        plan.vocab_size,
        _dtype(plan),
    )
    total, done = sum(source.n_bytes for source in plan.sources), 0
    on_progress(0, total)
    bad_sources: list[dict[str, Any]] = []

    def unfinished() -> Iterator[Task]:
        nonlocal done
        for path, pieces in tasks(plan, partial / "blocks", bad_sources):
            if path.exists():
                done += sum(piece.n_bytes for piece in pieces)
            else:
                yield path, pieces

    for (_, pieces), problems in encode_tasks(work, unfinished(), n_workers):
        done += sum(piece.n_bytes for piece in pieces)
        on_progress(done, total)
        if problems and not plan.skip_bad:
            raise _unusable(plan, *min(problems))
    on_progress(total, total)
    return bad_sources


def _dtype(plan: Plan) -> str:
    return "<u2" if plan.vocab_size <= 1 << 16 else "<u4"


def tasks(plan: Plan, folder: Path, bad_sources: list[dict[str, Any]]) -> Iterator[Task]:
    """The tasks of this part of the plan, each with the path of its block. Sorted, they have the order of the text.

    Args:
        bad_sources: sources that cannot be read are added here, if the plan skips them.
    """
    size, (i, n) = _block_bytes(plan), plan.part
    group: list[Piece] = []
    first, unit = (0, 0), 0
    for index, source in enumerate(plan.sources):
        pieces = pieces_of(index, source, plan.how, size)
        number = 0
        try:
            while (piece := next(pieces, None)) is not None:
                if piece.chunks is not None or piece.lines is not None:
                    # A source that can only be read from its beginning belongs to one machine.
                    if group:
                        if unit % n == i:
                            yield folder / _name(*first), tuple(group)
                        group, unit = [], unit + 1
                    if unit % n != i:
                        break
                    yield folder / _name(index, number), (piece,)
                else:
                    first = first if group else (index, number)
                    group.append(piece)
                    if sum(piece.n_bytes for piece in group) >= size:
                        if unit % n == i:
                            yield folder / _name(*first), tuple(group)
                        group, unit = [], unit + 1
                number += 1
        except InputError as error:
            if not plan.skip_bad:
                raise
            bad_sources.append({"path": str(source.path), "problem": str(error).replace("\n ", ";")})
        if is_stream(source, plan.how):
            unit += 1
    if group and unit % n == i:
        yield folder / _name(*first), tuple(group)


def _name(source: int, number: int) -> str:
    return f"{source:08}-{number:08}"


def _unusable(plan: Plan, source: int, offset: int, problem: str) -> InputError:
    return InputError(
        "a document cannot be used",
        found=problem,
        where=place_of(plan.sources[source], offset),
        hint="correct the file, or leave such documents out with --skip-bad",
    )


def place_of(source: Source, offset: int) -> str:
    """Where a document begins, as a person looks for it: the line of a text, or the row of a parquet file."""
    if source.format == "parquet":
        return f"{source.path}, row {offset + 1}"
    line, left = 1, offset
    try:
        with source.opened() as (stream, _):
            while left > 0 and (block := stream.read(min(left, CHUNK_BYTES))):
                line, left = line + block.count(b"\n"), left - len(block)
    except (InputError, OSError):  # the parts of other machines
        return f"{source.path}, byte {offset}"
    return f"{source.path}, line {line}"


def _assemble(plan: Plan, blocks: Sequence[Path], bad_sources: list[dict[str, Any]], folder: Path) -> None:
    """Writes the prepared data into a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_tokenizer(plan.tokenizer, folder)
    fixed = [source.split for source in plan.sources]
    splits = assign(blocks, fixed, plan.holdout, drop_duplicates=plan.drop_duplicates)
    counts = np.bincount(splits, minlength=3)
    if not counts[TRAIN] or not counts[VAL]:
        raise InputError(
            f"no document is left to {'hold out' if counts[TRAIN] else 'train on'}",
            found=f"{len(splits)} document(s), of which {counts[DROPPED]} cannot be used or are duplicates",
            hint="use more text, a different --holdout, or --separator if a file holds several documents",
        )
    described = write_shards(blocks, splits, folder)
    bad = [problem for path in blocks for problem in read_block(path, tokens=False).problems]
    listed = [{"where": place_of(plan.sources[s], at), "problem": what} for s, at, what in sorted(bad)[:LISTED]]
    n_bad = len(bad) + len(bad_sources)
    index = {
        "format_version": FORMAT_VERSION,
        "vocab_size": plan.vocab_size,
        "dtype": _dtype(plan),
        "tokenizer_sha256": hash_tokenizer(folder),
        **described,
        "holdout": {name: value for name, value in dataclasses.asdict(plan.holdout).items() if value is not None},
        "duplicates": int(counts[DROPPED]) - len(bad) if plan.drop_duplicates else None,
        "skipped": {"n_documents": n_bad, "listed": [*bad_sources, *listed]},
        "sources": [{"path": str(s.path), "n_bytes": s.n_bytes} for s in plan.sources],
        **dict(plan.about),
    }
    (folder / INDEX).write_text(
        json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace"
    )
    if n_bad:
        logger.warning(f"left out {n_bad} document(s) that cannot be used; {INDEX} lists them")


def merge(parts: Sequence[Path], out: Path) -> None:
    """Assembles the parts that several machines prepared: the result is that of one machine.

    Args:
        parts: their folders, in any order.

    Raises:
        InputError: `out` exists; a part is missing, is given twice, or has a different plan.
    """
    refuse_existing(out)
    found: dict[int, Path] = {}
    settings: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    for folder in parts:
        try:
            settings.append(json.loads((folder / PLAN).read_text(encoding="utf-8")))
            problems += json.loads((folder / PART).read_text(encoding="utf-8"))
            i, n = settings[-1].pop("part")
            settings[-1]["number of parts"] = n
            plan = _plan_of(settings[-1], folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError("not a part of a preparation", found=error, where=folder, hint="check the path") from error
        apart = settings[0].keys() - {"paths", "times"}
        if differing := sorted(name for name in apart if settings[-1][name] != settings[0][name]):
            hint = "prepare all parts from the same inputs, with the same options"
            problem = f"the parts have a different {', '.join(differing)}"
            raise InputError(problem, found=f"{parts[0]} and {folder}", hint=hint)
        if i in found:
            raise InputError("a part is given twice", found=f"{found[i]} and {folder}", hint="give each part once")
        found[i] = folder
    if missing := [f"{i + 1}/{n}" for i in range(n) if i not in found]:
        raise InputError("parts are missing", expected=f"{n} parts", found=f"no part {', '.join(missing)}")
    blocks = [path for folder in parts for path in finished_blocks(folder / "blocks")]
    blocks.sort(key=lambda path: path.name)
    partial = beside(out, "partial")
    make_folder(partial.parent)
    with lock(beside(out, "lock")), named_if_it_fails(out):
        _assemble(plan, blocks, problems, partial)
        commit_folder(partial, real_path(out))
        beside(out, "lock").unlink(missing_ok=True)
