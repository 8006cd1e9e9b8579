"""Compares two checkpoints of any kind, stage by stage, and says what is wrong if they differ.

A and B are each a run, a checkpoint, a Hugging Face folder (run by transformers), a GGUF file, or a checkpoint of the
original Mini-LLM. If a path is ambiguous, write KIND:PATH. The exit status is 0 if the two are equal within the
tolerance of the precision, and 1 if they are not.
"""

import sys
from typing import Annotated, Literal

import tyro

from minillm_cli.console import parse, say
from minillm_cli.process import let_threads_sleep
from minillm_cli.transformers_engine import TRANSFORMERS
from minillm_core.doctor.compare import compare
from minillm_core.doctor.report import PAGE_BEGINS, html_report, json_report, text_report
from minillm_core.files import make_folder, output_file, replace_file, user_path


def main() -> None:
    parse(parity, description=__doc__)


def parity(
    a: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="A")]],
    b: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="B")]],
    dtype: Literal["float64", "float32", "bfloat16"] = "float64",
    tokens: int = 512,
    seed: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    html: str | None = None,
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
        html: also write an HTML page with tables and plots; an existing page is replaced.
    """
    page = None
    if html is not None:
        make_folder(user_path(html).absolute().parent)
        page = output_file(html, PAGE_BEGINS.encode())
    let_threads_sleep()
    report = compare(a, b, dtype=dtype, n_tokens=tokens, seed=seed, engines={"hf": TRANSFORMERS})
    print(json_report(report) if as_json else text_report(report, color=sys.stdout.isatty()))
    if page is not None:
        replace_file(page, html_report(report))
        say(f"wrote {page}")
    sys.exit(0 if report.equal else 1)
