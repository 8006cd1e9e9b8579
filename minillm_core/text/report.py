"""Compares tokenizers: how many tokens they need for texts of many kinds, what they lose, and how fast they are."""

import base64
import html
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from minillm_core.text.samples import SAMPLES
from minillm_core.text.tokenizer import Tokenizer

PAGE_BEGINS = "<!doctype html>"
REPEATS = 3
"""The speed is that of the fastest of these calls."""
COLUMNS = ("bytes/token", "tokens/word", "unknown", "part of a character", "round trip", "MB/s")


@dataclass(frozen=True)
class Measured:
    """One tokenizer on one text."""

    tokenizer: str
    sample: str
    n_bytes: int
    n_tokens: int
    n_words: int
    """Words between spaces and line ends."""
    n_unknown: int
    """Tokens that stand for characters that the tokenizer does not have."""
    n_partial: int
    """Tokens that are not whole characters, such as single bytes."""
    is_lossless: bool
    """Whether decoding gives the text back."""
    bytes_per_second: float

    @cached_property
    def values(self) -> tuple[str, ...]:
        """COLUMNS, as text."""
        n_tokens = max(self.n_tokens, 1)
        return (
            f"{self.n_bytes / n_tokens:.2f}",
            f"{self.n_tokens / max(self.n_words, 1):.2f}",
            f"{self.n_unknown / n_tokens:.1%}",
            f"{self.n_partial / n_tokens:.1%}",
            "yes" if self.is_lossless else "NO",
            f"{self.bytes_per_second / 1e6:.2f}",
        )


def compare_tokenizers(tokenizers: Mapping[str, Tokenizer], prose: str) -> list[Measured]:
    """Every tokenizer on a prose text, which it should not have been trained on, and on the samples.

    Args:
        tokenizers: name -> tokenizer.
    """
    samples = {"prose": prose, **SAMPLES}
    return [_measure(name, own, sample, text) for sample, text in samples.items() for name, own in tokenizers.items()]


def _measure(name: str, tokenizer: Tokenizer, sample: str, text: str) -> Measured:
    lines = text.splitlines(keepends=True)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        tokenizer.encode_many(lines, 1)
        seconds.append(time.perf_counter() - start)
    ids = tokenizer.encode(text)
    partial = {i for i in {*ids} if "\ufffd" in tokenizer.decode([i])}
    n_bytes = len(text.encode())
    return Measured(
        name,
        sample,
        n_bytes,
        len(ids),
        len(text.split()),
        sum(i == tokenizer.unknown_id for i in ids),
        sum(i in partial for i in ids),
        tokenizer.decode(ids) == text,
        n_bytes / max(min(seconds), 1e-9),
    )


def text_table(measured: Sequence[Measured]) -> str:
    rows = [("sample", "tokenizer", *COLUMNS), *((m.sample, m.tokenizer, *m.values) for m in measured)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    return [asdict(m) for m in measured]


def picture(measured: Sequence[Measured]) -> bytes:
    """Bytes per token of every tokenizer on every text, as a PNG."""
    from matplotlib.figure import Figure

    names, samples = (list(dict.fromkeys(getattr(m, field) for m in measured)) for field in ("tokenizer", "sample"))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        own = {m.sample: m.n_bytes / max(m.n_tokens, 1) for m in measured if m.tokenizer == name}
        places = [i + (number - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(samples))]
        axes.bar(places, [own[sample] for sample in samples], 0.8 / len(names), label=name)
    axes.set_xticks(range(len(samples)), samples, rotation=30)
    axes.set_ylabel("bytes per token (more is better)")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def html_page(measured: Sequence[Measured]) -> str:
    """One page with the table and the picture."""
    header = "".join(f"<th>{html.escape(name)}</th>" for name in ("sample", "tokenizer", *COLUMNS))
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in (m.sample, m.tokenizer, *m.values)) + "</tr>"
        for m in measured
    )
    image = base64.b64encode(picture(measured)).decode()
    return (
        f'{PAGE_BEGINS}<html lang="en"><meta charset="utf-8"><title>Tokenizers</title>'
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}"
        "td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}tr:nth-child(even){background:#f3f3f3}</style>"
        f'<body><h1>Tokenizers</h1><img alt="bytes per token" src="data:image/png;base64,{image}">'
        f"<table><tr>{header}</tr>{rows}</table></body></html>\n"
    )
