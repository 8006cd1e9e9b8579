"""Prepares text for training.

    [PRESET|FILE.yaml] [--section.field value ...]

Trains a tokenizer on the corpus of a configuration and writes its token files, as `minillm train` does if they are
missing.

    INPUT... --tokenizer TOKENIZER --out FOLDER

Encodes files, folders or patterns (.txt, .md, .jsonl, also with .gz, .xz or .zst; .parquet, .arrow), or datasets of the
Hugging Face Hub (hf://datasets/OWNER/NAME), with an existing tokenizer.
"""

import contextlib
import itertools
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from minillm_cli.console import parse, parse_run_config
from minillm_core.config import RunConfig, preset_names
from minillm_core.data.assemble import Holdout
from minillm_core.data.documents import CHAT, PLAIN, Format
from minillm_core.data.hub import HUB
from minillm_core.data.inputs import find_sources
from minillm_core.data.merge import merge as join
from minillm_core.data.mixture import Mixture
from minillm_core.data.plan import DEFAULT_HOLDOUT, Plan
from minillm_core.data.prepare import prepare
from minillm_core.data.prepared import SPLITS, PreparedData
from minillm_core.data.run_data import open_or_prepare
from minillm_core.data.workers import n_cpus
from minillm_core.errors import InputError
from minillm_core.files import user_path
from minillm_core.text.tokenizer_json import collect_tokenizer, load_tokenizer

ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0", "\\": "\\"}


def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        with contextlib.suppress(SystemExit):
            parse(prepare_inputs, arguments=["--help"], description="Encodes text with an existing tokenizer.")
    elif _has_inputs(sys.argv[1:]):
        parse(prepare_inputs, description=__doc__)
        return
    config = parse_run_config(__doc__, RunConfig)
    data = open_or_prepare(config.data, config.model.vocab_size)
    print_sizes(*(data.parts.values() if isinstance(data, Mixture) else [data]))


def _has_inputs(arguments: list[str]) -> bool:
    """Whether the command line names inputs, and not a configuration."""
    if any(word.partition("=")[0] in ("--out", "--merge") for word in arguments):
        return True
    first = arguments[0] if arguments else ""
    if first.startswith(HUB):
        return True
    is_path = bool(first) and not first.startswith("-") and user_path(first).exists()
    return is_path and first not in preset_names() and not first.lower().endswith((".yaml", ".yml"))


def prepare_inputs(
    inputs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="INPUT...")]] = (),
    *,
    out: str,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    workers: int | None = None,
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    text_field: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    separator: str | None = None,
    holdout: str = str(DEFAULT_HOLDOUT.share),
    drop_duplicates: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    skip_bad: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    shard: str | None = None,
    merge: tuple[str, ...] = (),
) -> None:
    """Prepares text for training.

    Args:
        inputs: files, folders, patterns, or datasets such as hf://datasets/OWNER/NAME.
        out: the new folder for the prepared data.
        tokenizer: a tokenizer.model or tokenizer.json, or a folder with one, such as a checkpoint.
        vocab_size: vocabulary of the model that will be trained, if it has more rows than the tokenizer has pieces.
        workers: processes that encode; by default, one for every CPU.
        chat: the documents are conversations: only the assistant's replies count when a model is trained on them.
        text_field: field of a .jsonl line, or column of a table, with the text; by default `text` or, with --chat,
            `messages`.
        subset: subset of a dataset of the Hugging Face Hub.
        split: split of a dataset of the Hugging Face Hub; `train` by default.
        separator: what stands between two documents of a text file, such as `\\f`; without it, a file is one document.
        holdout: share of the documents to hold out, such as 0.01; or the number of tokens to hold out at most.
        drop_duplicates: leave out documents that are equal to an earlier one.
        skip_bad: leave out documents that cannot be used, and list them in index.json, instead of stopping.
        shard: prepare only a part, such as 2/8; the parts are joined with --merge.
        merge: folders of all parts, to be joined.
    """
    folder = user_path(out)
    if merge:
        if inputs or shard or tokenizer:
            raise InputError("--merge takes only the parts and --out", hint="leave out inputs, --shard and --tokenizer")
        join(tuple(map(user_path, merge)), folder)
    else:
        with tempfile.TemporaryDirectory() as collected:
            if tokenizer is None:
                hint = "train one with `minillm train-tokenizer`, or name that of a model"
                raise InputError("no tokenizer", expected="--tokenizer FILE|FOLDER", hint=hint)
            collect_tokenizer(user_path(tokenizer), Path(collected))
            size = load_tokenizer(Path(collected), sys.maxsize).vocab_size if vocab_size is None else vocab_size
            plan = Plan(
                sources=tuple(find_sources(inputs, subset=subset, split=split)),
                tokenizer=Path(collected),
                vocab_size=size,
                how=_format(text_field, separator, chat=chat),
                holdout=_holdout(holdout),
                drop_duplicates=drop_duplicates,
                skip_bad=skip_bad,
                part=_part(shard),
            )
            n_workers = n_cpus() if workers is None else workers
            if n_workers < 1:
                raise InputError("--workers is out of range", expected="1 or more", found=workers)
            prepare(plan, folder, n_workers=n_workers)
        if shard:
            print(folder)
            return
    print_sizes(PreparedData(folder, None))


def print_sizes(*folders: PreparedData) -> None:
    for data, split in itertools.product(folders, SPLITS):
        counted = f", {data.n_targets(split)} count" if data.is_chat else ""
        print(f"{data.dir}, {split}: {len(data.tokens[split])} tokens of {data.splits[split].n_bytes} bytes{counted}")


def _format(text_field: str | None, separator: str | None, *, chat: bool) -> Format:
    if not chat:
        return Format(text_field or PLAIN.text_field, _unescaped(separator or ""))
    if separator is not None:
        raise InputError("--separator is for files of text, --chat for conversations", hint="leave out one of them")
    return replace(CHAT, text_field=text_field or CHAT.text_field)


def _unescaped(text: str) -> bytes:
    return re.sub(r"\\(.)", lambda found: ESCAPES.get(found[1], found[0]), text, flags=re.DOTALL).encode()


def _holdout(text: str) -> Holdout:
    try:
        number = float(text)
        if 0 < number < 1:
            return Holdout(share=number)
        if number >= 1 and number.is_integer():
            return Holdout(n_tokens=int(number))
    except ValueError:
        pass
    expected = "a share between 0 and 1, or a number of tokens"
    raise InputError("--holdout is out of range", expected=expected, found=text)


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError("--shard is out of range", expected="I/N, with I from 1 to N", found=text)
    return int(found[1]) - 1, int(found[2])
