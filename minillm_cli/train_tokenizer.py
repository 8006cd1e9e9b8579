"""Trains a tokenizer on text.

The inputs are files, folders or patterns (.txt, .md, .jsonl, also with .gz, .xz or .zst; .parquet, .arrow), or datasets
of the Hugging Face Hub (hf://datasets/OWNER/NAME).
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minillm_cli.console import parse, say
from minillm_core.data.documents import Format
from minillm_core.data.inputs import find_sources
from minillm_core.data.pieces import read_texts, text_chunks
from minillm_core.data.sources import Source
from minillm_core.errors import InputError
from minillm_core.files import output_file, replace_file, user_path, written_aside
from minillm_core.text.report import PAGE_BEGINS, as_rows, compare_tokenizers, html_page, text_table
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.tokenizer_json import collect_tokenizer, load_tokenizer
from minillm_core.text.train_tokenizer import train_tokenizer

PROSE_CHARACTERS = 300_000
"""Characters of the inputs on which tokenizers are compared."""


def main() -> None:
    parse(train_tokenizer_on)


def train_tokenizer_on(
    inputs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="INPUT...")]],
    *,
    out: str | None = None,
    vocab_size: int = 32_000,
    kind: Literal["bpe", "unigram"] = "bpe",
    symbols: tuple[str, ...] = ("<user>", "<assistant>", "<system>"),
    text_field: str = "text",
    subset: str | None = None,
    split: str | None = None,
    report: tuple[str, ...] = (),
    html: str | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Trains a SentencePiece tokenizer, with the defaults of the original Mini-LLM; or, with --report, compares
    tokenizers on the inputs, which they should not have been trained on.

    Args:
        inputs: files, folders, patterns, or datasets such as hf://datasets/OWNER/NAME.
        out: the .model file to write.
        vocab_size: number of pieces.
        kind: merges of frequent pairs, or pieces of a unigram language model.
        symbols: texts that are always one piece, wherever they occur.
        text_field: field of a .jsonl line, or column of a table, with the text.
        subset: subset of a dataset of the Hugging Face Hub.
        split: split of a dataset of the Hugging Face Hub; `train` by default.
        report: the tokenizers to compare: .model files, tokenizer.json files, or folders with one.
        html: with --report, also write a page with the table and a picture; an existing page is replaced.
        as_json: with --report, print JSON.
    """
    sources = find_sources(inputs, subset=subset, split=split)
    if not sources:
        hint = "give the inputs first: an option with several values takes all words after it"
        raise InputError("no input", expected="files, folders, patterns or datasets", hint=hint)
    if report and out is not None:
        raise InputError("--report trains no tokenizer", hint="leave out --out, or --report")
    if report:
        page = None if html is None else output_file(html, PAGE_BEGINS.encode())
        if len({*report}) < len(report):
            raise InputError("a tokenizer is given twice", found=", ".join(report))
        prose = "".join(_first_texts(sources, Format(text_field), PROSE_CHARACTERS))
        measured = compare_tokenizers({name: _opened(name) for name in report}, prose)
        print(json.dumps(as_rows(measured), indent=1) if as_json else text_table(measured))
        if page is not None:
            replace_file(page, html_page(measured))
            say(f"wrote {page}")
        return
    if html is not None or as_json:
        raise InputError("--html and --json are only for --report")
    if out is None:
        expected = "--out FILE.model to train, or --report TOKENIZER... [--html FILE] [--json] to compare"
        raise InputError("nothing to do with the inputs", expected=expected)
    path = output_file(out)
    texts = read_texts(sources, Format(text_field))
    with written_aside(path) as partial:
        train_tokenizer(texts, vocab_size, partial, kind=kind, symbols=symbols)
    print(f"{path}: {Tokenizer(path).vocab_size} pieces")


def _first_texts(sources: Sequence[Source], how: Format, n: int) -> Iterator[str]:
    """About the first n characters of the inputs."""
    for text in itertools.chain.from_iterable(text_chunks(source, how) for source in sources):
        yield text[:n]
        n -= len(text)
        if n <= 0:
            return


def _opened(path: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        collect_tokenizer(user_path(path), Path(folder))
        return load_tokenizer(folder, sys.maxsize)
