"""Trains a tokenizer on text: files, folders or patterns (.txt, .md, .jsonl, .parquet; also .gz, .xz, .zst)."""

from collections.abc import Iterator
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from minillm_cli.console import parse
from minillm_core.data.documents import Format
from minillm_core.data.pieces import text_chunks
from minillm_core.data.sources import find_sources
from minillm_core.files import output_file, written_aside
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.train_tokenizer import train_tokenizer


def main() -> None:
    parse(train_tokenizer_on)


def train_tokenizer_on(
    inputs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="INPUT...")]],
    *,
    out: str,
    vocab_size: int = 32_000,
    kind: Literal["bpe", "unigram"] = "bpe",
    symbols: tuple[str, ...] = ("<user>", "<assistant>", "<system>"),
    text_field: str = "text",
) -> None:
    """Trains a SentencePiece tokenizer. The defaults are those of the original Mini-LLM.

    Args:
        inputs: files, folders or patterns.
        out: the .model file to write.
        vocab_size: number of pieces.
        kind: merges of frequent pairs, or pieces of a unigram language model.
        symbols: texts that are always one piece, wherever they occur.
        text_field: field of a .jsonl line, or column of a .parquet file, with the text.
    """
    path = output_file(out)
    sources = find_sources(inputs)
    total = sum(source.n_bytes for source in sources)

    def texts() -> Iterator[str]:
        with tqdm(total=total, unit="B", unit_scale=True, desc="reading") as bar:
            for source in sources:
                yield from text_chunks(source, Format(text_field))
                bar.update(source.n_bytes)

    with written_aside(path) as partial:
        train_tokenizer(texts(), vocab_size, partial, kind=kind, symbols=symbols)
    print(f"{path}: {Tokenizer(path).vocab_size} pieces")
