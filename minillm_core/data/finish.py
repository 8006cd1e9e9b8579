"""Encoded blocks to a folder of prepared data."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.data.assemble import BAD_DOCUMENT, DUPLICATE, TRAIN, VAL, assign, write_shards
from minillm_core.data.chunks import CHUNK_BYTES
from minillm_core.data.encode import read_block
from minillm_core.data.plan import CHAT_FORMAT_VERSION, FORMAT_VERSION, Plan, dtype_of
from minillm_core.data.prepared import INDEX
from minillm_core.data.sources import Source
from minillm_core.data.tables import is_table
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import copy_tokenizer, hash_tokenizer

logger = logging.getLogger(__name__)

LISTED = 1000
"""Documents that cannot be used and are listed in the index."""


def assemble_data(plan: Plan, blocks: Sequence[Path], bad_sources: list[dict[str, Any]], folder: Path) -> None:
    """Writes the prepared data into a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_tokenizer(plan.tokenizer, folder)
    fixed = [source.split for source in plan.sources]
    splits = assign(blocks, fixed, plan.holdout, drop_duplicates=plan.drop_duplicates)
    counts = np.bincount(splits, minlength=4)
    if not counts[TRAIN] or not counts[VAL]:
        raise InputError(
            f"no document is left to {'hold out' if counts[TRAIN] else 'train on'}",
            found=f"{len(splits)} document(s): {counts[TRAIN]} to train on, {counts[VAL]} held out, "
            f"{counts[BAD_DOCUMENT]} unusable, {counts[DUPLICATE]} duplicates",
            hint="use more text, a different --holdout, or --separator if a file holds several documents"
            if plan.holdout.every is None
            else "use more text, or lower data.holdout_every",
        )
    described = write_shards(blocks, splits, folder, has_marks=plan.how.chat)
    problems = {(s, at): what for path in blocks for s, at, what in read_block(path, tokens=False).problems}
    listed = sorted(problems.items())[:LISTED]
    places = {
        number: places_of(plan.sources[number], [at for (s, at), _ in listed if s == number])
        for number in {s for (s, _), _ in listed}
    }
    n_bad = int(counts[BAD_DOCUMENT])
    index = {
        "format_version": CHAT_FORMAT_VERSION if plan.how.chat else FORMAT_VERSION,
        "vocab_size": plan.vocab_size,
        "dtype": dtype_of(plan),
        "tokenizer_sha256": hash_tokenizer(folder),
        **described,
        "holdout": {name: value for name, value in dataclasses.asdict(plan.holdout).items() if value is not None},
        "duplicates": int(counts[DUPLICATE]) if plan.drop_duplicates else None,
        "skipped": {
            "n_documents": n_bad,
            "sources": bad_sources,
            "listed": [{"where": places[s][at], "problem": what} for (s, at), what in listed],
        },
        "sources": [
            {"path": str(s.path), "n_bytes": s.n_bytes} | ({"origin": s.origin} if s.origin else {})
            for s in plan.sources
        ],
        **dict(plan.about),
    }
    text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8", errors="replace")
    if counts[DUPLICATE]:
        logger.info(f"left out {counts[DUPLICATE]} document(s) that are equal to an earlier one")
    if n_bad or bad_sources:
        more = f", and the rest of {len(bad_sources)} file(s)" if bad_sources else ""
        logger.warning(f"left out {n_bad} document(s) that cannot be used{more}; {INDEX} lists them")


def unusable(source: Source, offset: int, problem: str) -> InputError:
    return InputError(
        "a document cannot be used",
        found=problem,
        where=places_of(source, [offset])[offset],
        hint="correct the file, or leave such documents out with --skip-bad",
    )


def places_of(source: Source, offsets: Sequence[int]) -> dict[int, str]:
    """Where documents begin, as a person looks for it: the line of a text, or the row of a table."""
    if is_table(source):
        return {offset: f"{source.path}, row {offset + 1}" for offset in offsets}
    found, line, position = {}, 1, 0
    try:
        with source.opened() as (stream, _):
            for offset in sorted(offsets):
                while position < offset and (block := stream.read(min(offset - position, CHUNK_BYTES))):
                    line, position = line + block.count(b"\n"), position + len(block)
                found[offset] = f"{source.path}, line {line}"
    except (InputError, OSError):  # a file of a different machine
        return {offset: f"{source.path}, byte {offset}" for offset in offsets}
    return found
