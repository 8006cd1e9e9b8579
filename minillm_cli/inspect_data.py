"""Shows what is in a folder of prepared data, and compares its files with their hashes."""

import sys
from typing import Annotated

import numpy as np
import tyro

from minillm_cli.console import parse, say
from minillm_core.data.inspect import DataReport, SplitReport, inspect_data, plot_lengths
from minillm_core.files import output_file

LISTED = 20
"""Sources that are listed."""


def main() -> None:
    parse(inspect_folder)


def inspect_folder(
    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]],
    samples: int = 3,
    out: str | None = None,
) -> None:
    """Shows counts, lengths of documents, the share of each source, and decoded samples. The exit status is 1 if a file
    is damaged.

    Args:
        folder: a folder of prepared data.
        samples: documents of each split whose beginning is shown.
        out: a PNG file for a histogram of the lengths of the documents; an existing PNG is replaced.
    """
    picture = None if out is None else output_file(out, b"\x89PNG")
    report = inspect_data(folder, samples)
    print(text_of(report))
    if picture is not None:
        plot_lengths(report, picture)
        say(f"drew {picture}")
    sys.exit(1 if report.damaged else 0)


def text_of(report: DataReport) -> str:
    lines = [str(report.folder)]
    for name, split in report.splits.items():
        lines += [
            "",
            f"{name}: {split.n_tokens:,} tokens of {split.n_bytes or 0:,} bytes",
            *_lengths(split),
            *_counted(split),
        ]
        if not split.n_tokens:
            continue
        sources = sorted(split.tokens_of_source.items(), key=lambda item: -item[1])
        lines += [f"  {count / split.n_tokens:6.1%}  {source}" for source, count in sources[:LISTED] if count]
        if len(sources) > LISTED:
            rest = sum(count for _, count in sources[LISTED:])
            lines.append(f"  {rest / split.n_tokens:6.1%}  {len(sources) - LISTED} more sources")
        lines += [f"  sample: {sample!r}" for sample in split.samples]
    if report.n_skipped:
        lines += ["", f"{report.n_skipped} document(s) could not be used; index.json lists them"]
    lines += ["", *(f"DAMAGED: {path}" for path in report.damaged)] if report.damaged else ["", "all files are intact"]
    return "\n".join(lines)


def _lengths(split: SplitReport) -> list[str]:
    if not len(split.lengths):
        return []
    quantiles = ", ".join(f"{np.quantile(split.lengths, q):,.0f}" for q in (0, 0.1, 0.5, 0.9, 1))
    return [f"  {len(split.lengths):,} documents; tokens of a document (least, 10 %, 50 %, 90 %, most): {quantiles}"]


def _counted(split: SplitReport) -> list[str]:
    if split.n_counted is None:
        return []
    share = split.n_counted / split.n_tokens
    return [f"  {split.n_counted:,} tokens ({share:.1%}) are replies of the assistant: only they count in the loss"]
