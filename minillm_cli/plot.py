"""Draws the curves of one or several runs: loss, learning rate, gradient norm, speed."""

from pathlib import Path
from typing import Annotated

import tyro

from minillm_cli.console import parse, say
from minillm_core.errors import InputError
from minillm_core.files import output_file, user_path
from minillm_core.training.curves import Axis, find_curves, why_not_comparable
from minillm_core.training.plots import plot_curves

USUAL = ("loss", "learning_rate", "grad_norm", "tokens_per_second")

BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml"}
"""Suffix of a picture -> how such a file begins."""


def main() -> None:
    parse(plot)


def plot(
    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[RUN ...]")]] = ("runs/quickstart",),
    x: Axis = "step",
    y: tuple[str, ...] = USUAL,
    out: str = "plot.png",
) -> None:
    """Draws runs into one picture.

    Args:
        runs: runs (every framework that they were trained in), or their framework folders, such as runs/a/jax.
        x: the horizontal axis. `flops` are those of training, with the masked half of attention; `time` is without
            evaluations and checkpoints.
        y: metrics of metrics.jsonl, each in a panel of its own; also bits_per_byte, perplexity or mfu.
        out: the .png or .svg file to write; an existing picture is replaced.
    """
    suffix = Path(out).suffix.lower()
    if suffix not in BEGINNINGS:
        raise InputError("the kind of picture is not known", expected=".png or .svg", found=out)
    picture = output_file(out, BEGINNINGS[suffix])
    curves = find_curves([user_path(run) for run in runs])
    known = set().union(*(run.fields for run in curves))
    fields = [field for field in USUAL if field in known] if y is USUAL else list(dict.fromkeys(y))
    for reason in why_not_comparable(curves, fields, x):
        say(f"warning: {reason}")
    plot_curves(curves, fields, x, picture)
    print(picture)
