"""Continues a file of prompts, in batches of similar length. A stopped job can be resumed."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm_core.decoding.generation import BaseGenerator
from minillm_core.decoding.requests import Prompt
from minillm_core.errors import InputError
from minillm_core.files import beside, lock, named_if_it_fails, real_path, replace_file
from minillm_core.progress import progress

logger = logging.getLogger(__name__)

Conversation = list[dict[str, str]]
"""Messages, each with a role and a content."""


def continue_file(
    generator: BaseGenerator,
    prompts: Path,
    output: Path,
    batch_size: int,
    setup: Mapping[str, Any],
    options: Mapping[str, Any],
    encode: Callable[[str | Conversation], list[int]] | None = None,
) -> None:
    """Writes one line per prompt to `output`: index, prompt or messages, completions (each with text and
    finish_reason).

    Finished prompts go to OUTPUT.partial, whose first line describes the request. At the end they are written to OUTPUT
    in the order of the prompts, and OUTPUT.partial is removed.

    Args:
        batch_size: prompts per batch.
        setup: everything else that the result depends on: the checkpoint, the framework, the dtype.
        options: arguments of BaseGenerator.generate; must include `n` and `logprobs`.
        encode: the token ids of a prompt or of messages, in the chat format of the model; None: there are no messages,
            and each prompt is continued as it is.

    Raises:
        InputError: OUTPUT exists; OUTPUT.partial belongs to a different request; a prompt or an option is bad. This is
            raised before anything is generated.
    """
    if batch_size < 1:
        raise InputError("batch_size is out of range", expected="1 or more", found=batch_size)
    lock_file = beside(output, "lock")
    if not lock_file.parent.is_dir():
        raise InputError("no such folder", where=output.parent, hint="create it, or choose a different path")
    if output.is_dir():
        raise InputError("the output is a folder", expected="the name of a new file", where=output)
    items, digest = read_prompts(prompts, with_messages=encode is not None)
    inputs = _inputs(items, encode, prompts)
    generator.check(inputs, **options)
    request = {"prompts": digest, "setup": dict(setup), "options": dict(options)}
    request = json.loads(json.dumps(request))  # as it will be read back: tuples become lists
    partial = lock_file.with_name(f"{real_path(output).name}.partial")
    with lock(lock_file):
        if output.exists():
            lock_file.unlink()
            raise InputError(
                "the output exists already", where=output, hint="choose a different name, or remove the file"
            )
        done = _open_partial(partial, request)
        if done:
            logger.info(f"resuming: {len(done)} of {len(items)} prompts are done")
        ids = inputs if encode else generator.tokenizer.encode_many([str(text) for text in items])
        waiting = sorted((i for i in range(len(items)) if i not in done), key=lambda i: -len(ids[i]))
        with (
            named_if_it_fails(partial),
            partial.open("a", encoding="utf-8") as file,
            progress("generating", len(items), "prompt") as work,
        ):
            work.skip(len(done))
            for start in range(0, len(waiting), batch_size):
                batch = waiting[start : start + batch_size]
                rows = _continue(generator, [inputs[i] for i in batch], options)
                for index, completions in zip(batch, rows, strict=True):
                    name = "prompt" if isinstance(items[index], str) else "messages"
                    done[index] = {"index": index, name: items[index], "completions": completions}
                    file.write(json.dumps(done[index], ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                work.advance(len(batch))
        replace_file(output, "".join(json.dumps(done[i], ensure_ascii=False) + "\n" for i in sorted(done)))
        partial.unlink()
        lock_file.unlink()


def _inputs(
    items: Sequence[str | Conversation], encode: Callable[[str | Conversation], list[int]] | None, where: Path
) -> list[Prompt]:
    """What the generator gets for each prompt of a file."""
    inputs: list[Prompt] = []
    for number, item in enumerate(items, 1):
        if encode is None:
            inputs.append(str(item))
            continue
        try:
            inputs.append(encode(item))
        except InputError as error:
            raise InputError(f"{where}, line {number}: {error}") from error
    return inputs


def read_prompts(path: Path, *, with_messages: bool = False) -> tuple[list[str | Conversation], str]:
    """The prompts of a file: one per line; if the file's name ends in .jsonl, one object with a "prompt" per line. The
    file is read once, because it may be a pipe.

    Args:
        with_messages: an object may have "messages" instead; they are returned as they are.

    Returns:
        the prompts, and the SHA-256 of the content.

    Raises:
        InputError: the file is missing, is not UTF-8, or has an empty or malformed line.
    """
    is_json = path.suffix.lower() == ".jsonl"
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        expected, hint = "a UTF-8 text file", "check the path and the encoding"
        raise InputError("cannot read the prompts", expected=expected, found=error, where=path, hint=hint) from error
    if lines == [""]:
        raise InputError("no prompts", expected="at least one line", found="an empty file", where=path)
    prompts: list[str | Conversation] = []
    for number, line in enumerate(lines, 1):
        text: Any = line.removesuffix("\r")
        if is_json:
            try:
                found = json.loads(line, object_pairs_hook=_without_repeats)
                if with_messages and "messages" in found and "prompt" not in found:
                    prompts.append(found["messages"])
                    continue
                text = found["prompt"]
                text.encode()  # fails for half of a surrogate pair, which is not text
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                text = None
        if not isinstance(text, str) or not text:
            expected = '{"prompt": "..."}' if is_json else "text"
            expected += ' or {"messages": [...]}' if is_json and with_messages else ""
            hint = "correct this line, or remove it"
            raise InputError(
                "not a prompt", expected=expected, found=repr(line), where=f"{path}, line {number}", hint=hint
            )
        prompts.append(text)
    return prompts, hashlib.sha256(content).hexdigest()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError if it has a key twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _open_partial(partial: Path, request: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The lines that an earlier call finished, by prompt index. An incomplete last line is removed."""
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    if not lines:
        replace_file(partial, json.dumps({"request": request}) + "\n")
        return {}
    try:
        found = json.loads(whole[0])["request"]
        rows = [json.loads(line) for line in whole[1:]]
        done = {row["index"]: row for row in rows}
    except (ValueError, LookupError, TypeError) as error:
        expected = "the unfinished output of an earlier call"
        raise InputError("cannot resume from this file", expected=expected, where=partial, hint="remove it") from error
    if found != request:
        differing = [
            f"{name}: {old.get(name)!r}, now {new.get(name)!r}"
            for part in ("setup", "options")
            for old, new in [(found[part], request[part])]
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        raise InputError(
            "the unfinished output belongs to a different request",
            found="; ".join(differing) or "different prompts",
            where=partial,
            hint="repeat the command that created it, or remove the file",
        )
    if len(whole) < len(lines):
        os.truncate(partial, sum(map(len, whole)))
    return done


def _continue(
    generator: BaseGenerator, prompts: Sequence[Prompt], options: Mapping[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """The completions of each prompt, in the form of the output file."""
    n = options["n"]
    completions = generator.generate(prompts, **{**options, "logprobs": True})
    for i in range(len(prompts)):
        rows = []
        for completion in completions[i * n : (i + 1) * n]:
            row: dict[str, Any] = {"text": completion.text, "finish_reason": completion.finish_reason}
            if options["logprobs"]:
                row |= {"tokens": completion.tokens, "logprobs": completion.logprobs}
            rows.append(row)
        yield rows
