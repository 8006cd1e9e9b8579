"""Draws the loss curves of two runs, and their difference, as one picture."""

from pathlib import Path
from typing import Annotated

import tyro

from minillm_cli.console import parse, say
from minillm_core.config import config_differences, load_config
from minillm_core.errors import InputError
from minillm_core.files import output_file, real_path, user_path
from minillm_core.training.checkpoints import FRAMEWORKS
from minillm_core.training.curves import read_curves
from minillm_core.training.plots import plot_two_losses


def main() -> None:
    parse(compare_runs)


def compare_runs(
    a: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[A]")]] = "runs/quickstart",
    b: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[B]")]] = None,
    out: str = "curves.png",
) -> None:
    """Compares two runs.

    Args:
        a: the framework folder of a run (`runs/x/jax`); or, without `b`, a run that was trained in both frameworks.
        b: the framework folder of a second run.
        out: the PNG file to write; an existing PNG is replaced.
    """
    picture = output_file(out, b"\x89PNG")
    folders = [user_path(a) / name for name in FRAMEWORKS] if b is None else [user_path(a), user_path(b)]
    runs = {str(folder): read_curves(folder).rows for folder in folders}
    if len(runs) < 2:
        raise InputError("both folders are the same", found=a, hint="give two different folders")
    differences = plot_two_losses(runs, picture)
    if not any(differences.values()):
        raise InputError("the runs have no logged step in common", found=" and ".join(runs))
    ours, theirs = runs.values()
    if differing := differing_fields(*folders):
        say("the configurations of the two runs differ:\n  " + "\n  ".join(differing))
    if copied := sum(row in theirs for row in ours):
        say(f"{copied} rows are identical, even the speeds: one log was copied together with a converted checkpoint")
    for split, apart in differences.items():
        if apart:
            worst = max(apart, key=lambda step: apart[step])
            print(f"{split}: {len(apart)} common steps, largest difference {apart[worst]:.3g} at step {worst}")
    say(f"drew {out}")


def differing_fields(a: Path, b: Path) -> list[str]:
    """The fields in which the configurations of two framework folders' runs differ."""
    saved = [real_path(folder).parent / "config.yaml" for folder in (a, b)]
    if not all(path.is_file() for path in saved):
        return []
    return config_differences(*(load_config(str(path)) for path in saved))
