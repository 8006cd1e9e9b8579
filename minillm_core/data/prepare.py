"""Raw text to prepared data, in two stages: encode every document, then assemble the shards.

The first stage writes a block for each task; a killed preparation goes on after the blocks that exist. What is in the
blocks depends only on the sources and the tokenizer, so the result is the same for any number of workers, and for any
number of machines whose parts are merged.
"""

import dataclasses
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm_core.data.encode import Work, blocks_of, read_block
from minillm_core.data.finish import assemble_data, unusable
from minillm_core.data.plan import Plan, dtype_of, settings_of, tasks
from minillm_core.data.prepared import INDEX
from minillm_core.data.workers import Task, WorkerEndedError, encode_tasks
from minillm_core.errors import InputError
from minillm_core.files import (
    beside,
    commit_folder,
    flush,
    hash_files,
    lock,
    make_folder,
    named_if_it_fails,
    real_path,
    refuse_existing,
    replace_file,
)
from minillm_core.progress import progress
from minillm_core.text.chat_template import ChatTemplate
from minillm_core.text.tokenizer import Tokenizer, copy_tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer

PLAN, PART = "plan.json", "part.json"
FAILED = "failed"
"""Marks work that ended because of its input: a corrected call with a different plan begins again."""
OF_ASSEMBLY = {"holdout", "drop_duplicates", "skip_bad"}
"""Settings that do not change the blocks: work may go on with different ones."""


def prepare(plan: Plan, out: Path, *, n_workers: int = 1) -> None:
    """Prepares the data of a plan in the new folder `out`, which appears only when it is complete.

    If an earlier call was killed, or the disk was full, the same call continues its work.

    Args:
        n_workers: processes that encode text.

    Raises:
        InputError: `out` exists; a source cannot be read, or a document in it (unless `skip_bad`); no document is left
            for one of the splits; an earlier call with a different plan was not finished.
    """
    if not plan.sources:
        raise InputError("no input", expected="files, folders or patterns")
    refuse_existing(out)
    make_folder(beside(out, "partial").parent)
    with lock(beside(out, "lock")):
        if (out / INDEX).is_file():  # finished by a process that was killed at the very end, or by another one
            shutil.rmtree(beside(out, "partial"), ignore_errors=True)
        refuse_existing(out)
        carry_out(plan, out, n_workers=n_workers)
        beside(out, "lock").unlink(missing_ok=True)


def carry_out(plan: Plan, out: Path, *, restart: bool = False, n_workers: int = 1) -> None:
    """`prepare`, for a caller that holds the lock.

    Args:
        restart: remove the unfinished work of a different plan, instead of raising.
    """
    partial = beside(out, "partial")
    with named_if_it_fails(out):
        folder = _begin(plan, partial, restart)
        plan = dataclasses.replace(plan, tokenizer=partial / "tokenizer")
        try:
            blocks, bad_sources = _encode(plan, folder, n_workers)
            if plan.part == (0, 1):
                assemble_data(plan, blocks, bad_sources, partial / "data")
        except WorkerEndedError:
            raise
        except InputError:
            (partial / FAILED).touch()
            raise
        if plan.part != (0, 1):
            digests = hash_files(blocks, "hashing the part")
            hashes = {path.name: digest for path, digest in zip(blocks, digests, strict=True)}
            replace_file(partial / PART, json.dumps({"blocks": hashes, "bad_sources": bad_sources}))
            commit_folder(partial, real_path(out))
        else:
            commit_folder(partial / "data", real_path(out))
            shutil.rmtree(partial, ignore_errors=True)


def _begin(plan: Plan, partial: Path, restart: bool) -> Path:
    """The folder of the blocks: of an unfinished preparation with the same plan, or a new one.

    Its name is random: a worker whose parent was killed cannot write into the folder of a later plan.
    """
    tokenizer = load_tokenizer(plan.tokenizer, plan.vocab_size)
    if tokenizer.eos_id < 0 or not tokenizer.fits(plan.vocab_size):
        expected = f"an end-of-document token, and at most {plan.vocab_size} tokens"
        found = f"{tokenizer.vocab_size} tokens, end of document {tokenizer.eos_id}"
        raise InputError("the tokenizer cannot be used", expected=expected, found=found, where=tokenizer.path)
    if plan.how.chat:
        _check_chat(plan, tokenizer)
    places = {"paths": [str(s.path) for s in plan.sources], "times": [s.stamp() for s in plan.sources]}
    settings = json.loads(json.dumps(settings_of(plan) | {"part": plan.part} | places))
    path = partial / PLAN
    if path.is_file():
        try:
            found_plan: Any = json.loads(path.read_text(encoding="utf-8"))
            of_blocks = settings.keys() - OF_ASSEMBLY
            differing = [name for name in settings if name in of_blocks and found_plan.get(name) != settings[name]]
            folder = partial / str(found_plan["blocks"])
        except (ValueError, AttributeError, LookupError):
            differing, folder = ["plan.json, which is damaged"], partial
        if not differing and folder.is_dir():
            (partial / FAILED).unlink(missing_ok=True)
            replace_file(path, json.dumps(settings | {"blocks": folder.name}))
            return folder
        if not restart and not (partial / FAILED).exists():
            hint = f"give the command that was interrupted, or remove {partial} to begin again"
            problem = "an unfinished preparation has a different " + ", ".join(differing)
            raise InputError(problem.replace("times", "text"), where=partial, hint=hint)
    shutil.rmtree(partial, ignore_errors=True)
    folder = partial / f"blocks-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    (partial / "tokenizer").mkdir(exist_ok=True)
    copy_tokenizer(plan.tokenizer, partial / "tokenizer")
    for copied in (partial / "tokenizer").rglob("*"):
        flush(copied)
    replace_file(path, json.dumps(settings | {"blocks": folder.name}))
    return folder


def _check_chat(plan: Plan, tokenizer: Tokenizer) -> None:
    """
    Raises:
        InputError: a source cannot have conversations, or the tokenizer has no template for them.
    """
    for source in plan.sources:
        if source.format == "text":
            expected = "lines of JSON (.jsonl), or a table (.parquet, .arrow)"
            raise InputError("a file of text has no conversations", expected=expected, where=source.path)
    ChatTemplate.of(tokenizer)


def _encode(plan: Plan, folder: Path, n_workers: int) -> tuple[list[Path], list[dict[str, Any]]]:
    """Encodes all tasks that are not finished. Returns all blocks, in order, and the sources that cannot be read.

    Raises:
        InputError: a document cannot be used, and the plan does not skip such documents.
    """
    stamps = tuple(source.stamp() for source in plan.sources)
    work = Work(plan.sources, stamps, plan.how, plan.tokenizer, plan.vocab_size, dtype_of(plan))
    tasked: list[Path] = []
    bad_sources: list[dict[str, Any]] = []

    def unfinished() -> Iterator[Task]:
        for path, pieces in tasks(plan, folder, bad_sources):
            tasked.append(path)
            if path.exists():
                counter.skip(sum(piece.n_bytes for piece in pieces))
            else:
                yield path, pieces

    n_bytes, (i, n) = sum(source.n_bytes for source in plan.sources), plan.part
    doing = "encoding" if n == 1 else f"encoding part {i + 1} of {n}, about"
    with progress(doing, n_bytes // n, "B") as counter:
        for (_, pieces), problems in encode_tasks(work, unfinished(), n_workers):
            counter.advance(sum(piece.n_bytes for piece in pieces))
            if problems and not plan.skip_bad:
                break
        else:
            counter.finish()  # an unreadable source; what a part has more or less than the others
    blocks = [block for path in sorted(tasked) if path.exists() for block in blocks_of(path)]
    problems = [problem for path in blocks for problem in read_block(path, tokens=False).problems]
    if problems and not plan.skip_bad:
        source, offset, problem = min(problems)
        raise unusable(plan.sources[source], offset, problem)
    return blocks, bad_sources
