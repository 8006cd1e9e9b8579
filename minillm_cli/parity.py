"""Compares two checkpoints of any kind, stage by stage, and says what is wrong if they differ.

A and B are each a run, a checkpoint, a Hugging Face folder (run by transformers), a GGUF file, or a checkpoint of the
original Mini-LLM. If a path is ambiguous, write KIND:PATH. The exit status is 0 if the two are equal within the
tolerance of the precision, and 1 if they are not.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minillm_cli.backends import let_threads_sleep
from minillm_cli.console import parse, say
from minillm_cli.transformers_engine import TRANSFORMERS
from minillm_core.doctor.compare import compare
from minillm_core.doctor.report import html_report, json_report, text_report
from minillm_core.errors import InputError
from minillm_core.files import make_folder, replace_file, user_path


def main() -> None:
    parse(parity, description=__doc__)


def parity(
    a: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="A")]],
    b: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="B")]],
    dtype: Literal["float64", "float32", "bfloat16"] = "float64",
    tokens: int = 512,
    seed: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    html: Path | None = None,
) -> None:
    """Compares two checkpoints.

    Args:
        a: the checkpoint that is right, if you know which one is.
        b: the checkpoint to compare with it.
        dtype: dtype of the computation, independent of the files; float64 shows faults that rounding hides in float32
            and bfloat16.
        tokens: length of each row: two rows of random ids and, if A or B has a tokenizer, one of text. Some faults show
            only in long rows.
        seed: seed of the random ids.
        as_json: print the whole report as JSON.
        html: also write an HTML page with tables and plots.
    """
    if html is not None:
        html = user_path(html)
        check_writable(html)
    let_threads_sleep()
    report = compare(a, b, dtype=dtype, n_tokens=tokens, seed=seed, engines={"hf": TRANSFORMERS})
    print(json_report(report) if as_json else text_report(report, color=sys.stdout.isatty()))
    if html is not None:
        replace_file(html, html_report(report))
        say(f"wrote {html}")
    sys.exit(0 if report.equal else 1)


def check_writable(page: Path) -> None:
    """Creates the folder of a page; raises InputError if the page cannot be written, before any work is done."""
    if page.is_dir():
        raise InputError("the HTML page must be a file", expected="--html FILE", found="a folder", where=page)
    folder = page.absolute().parent
    make_folder(folder)
    if not os.access(folder, os.W_OK):
        raise InputError("no permission to write the page", where=page.parent, hint="name a different file")
