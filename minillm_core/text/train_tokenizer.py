"""Trains a SentencePiece tokenizer on texts of any size, in bounded memory."""

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import sentencepiece

from minillm_core.errors import InputError
from minillm_core.progress import progress
from minillm_core.text.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID

Kind = Literal["bpe", "unigram"]

SAMPLE_BYTES, SAMPLE_LINES = 200_000_000, 2_000_000
"""Of larger texts, a random sample of lines is used: SentencePiece keeps it in memory several times."""

LINE_PARTS = re.compile(r"(?s).{1,65536}(?= |\Z)|.{1,65536}")
"""A line as the tokenizer is trained on it: in parts of at most 64 Ki characters, cut before spaces. (SentencePiece
leaves out longer lines.)"""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: Path, *, kind: Kind = "bpe", symbols: Sequence[str] = ()
) -> None:
    """Trains a model of exactly vocab_size pieces and writes it to `path`.

    The text is not changed: no normalisation, no merging of spaces. A newline is a separate piece, and a character
    without a piece falls back to its UTF-8 bytes. So bits per byte refer to the original text.

    Args:
        texts: text, in chunks that end at line ends.
        symbols: texts that are always one piece, such as `<user>`.

    Raises:
        InputError: the text is too small for that many pieces, or has too many characters; a symbol cannot be used.
    """
    if wrong := [symbol for symbol in symbols if not symbol or "\n" in symbol or symbols.count(symbol) > 1]:
        expected = "different texts, not empty and without line ends"
        raise InputError("a symbol cannot be a piece", expected=expected, found=repr(wrong[0]))
    model, training = io.BytesIO(), ExitStack()

    def lines() -> Iterator[str]:
        yield from sample_lines(texts, SAMPLE_BYTES, SAMPLE_LINES)
        # SentencePiece has the text now. It does not tell how far it is.
        training.enter_context(progress(f"training {vocab_size:,} pieces (time unknown)", None, "piece"))

    try:
        with training:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines(),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=kind,
                byte_fallback=True,
                character_coverage=1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                user_defined_symbols=["\n", *symbols],
                max_sentence_length=1 << 20,
                # never exceeded: the sample of SentencePiece differs from call to call
                input_sentence_size=SAMPLE_LINES,
                unk_id=UNK_ID,
                bos_id=BOS_ID,
                eos_id=EOS_ID,
                pad_id=PAD_ID,
                minloglevel=2,
            )
    except (RuntimeError, OSError) as error:
        raise _untrainable(vocab_size, " ".join(str(error).split())) from error
    path.write_bytes(model.getvalue())


def sample_lines(texts: Iterable[str], n_bytes: int, n_lines: int) -> Iterator[str]:
    """All lines of the texts, without line ends and empty lines; of more than n_bytes or n_lines, a random sample. The
    same texts give the same sample."""
    rng = random.Random(0)
    kept: list[tuple[float, int, str]] = []  # a heap: the line that goes next is first
    size = 0
    for number, line in enumerate(_lines(texts)):
        order = -rng.random()
        if (size >= n_bytes or len(kept) >= n_lines) and order <= kept[0][0]:
            continue
        heapq.heappush(kept, (order, number, line))
        size += len(line.encode("utf-8", "replace"))
        while (size > n_bytes and len(kept) > 1) or len(kept) > n_lines:
            size -= len(heapq.heappop(kept)[2].encode("utf-8", "replace"))
    yield from (line for _, _, line in sorted(kept, key=lambda item: item[1]))


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from LINE_PARTS.findall(line)


def _untrainable(vocab_size: int, said: str) -> InputError:
    """The error for a corpus that SentencePiece cannot train on, from what SentencePiece says."""
    problem = f"SentencePiece cannot train {vocab_size} pieces on this corpus"
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", said):
        found = f"{needed[1]} pieces are needed for the bytes, the control symbols and every character of the corpus"
        return InputError(problem, found=found, hint=f"raise the vocabulary size to {needed[1]} or more")
    if most := re.search(r"too high \(\d+\).*<= (\d+)", said):
        hint = f"use more text, or lower the vocabulary size to {most[1]}"
        return InputError(problem, found=f"text for {most[1]} pieces", hint=hint)
    return InputError(problem, found=said, hint="use more text, or a different vocabulary size")
