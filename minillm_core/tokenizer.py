"""SentencePiece BPE: train, encode, decode. decode(encode(text)) == text for every text without U+2581."""

import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from minillm_core.errors import InputError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3

TOKENIZER_MODEL, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_MODEL,
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    GENERATION_CONFIG,
    CHAT_TEMPLATE,
)
"""What goes along with a model: the first for our own, any of them for imported ones."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer's files that are in a folder."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty if there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / TOKENIZER_CONFIG
    try:
        data: Any = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(data, dict):
            raise ValueError(type(data).__name__)
    except (ValueError, RecursionError) as error:
        do = "get the file again, or remove it"
        raise InputError("damaged file", expected="a JSON object", found=error, where=path, do=do) from error
    return data


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json; empty if there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / GENERATION_CONFIG
    try:
        data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        ids = data.get("eos_token_id")
        if not all(i is None or type(i) is int for i in (ids if isinstance(ids, list) else [ids])):
            raise ValueError(f"eos_token_id: {ids!r}")
    except (ValueError, AttributeError, RecursionError) as error:
        expected = "a JSON object whose eos_token_id is an id, several, or null"
        do = "get the file again, or remove it"
        raise InputError("damaged file", expected=expected, found=error, where=path, do=do) from error
    return data


def read_end_ids(folder: Path, eos_id: int) -> frozenset[int]:
    """The tokens that end a text: as in transformers those of generation_config.json, or else `eos_id`."""
    ids = read_generation_config(folder).get("eos_token_id")
    return frozenset(ids if isinstance(ids, list) and ids else [eos_id if ids in (None, []) else ids])


def train_tokenizer(lines: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a BPE model of exactly vocab_size pieces and writes it to `path`.

    Text is kept as it is: no normalisation, no merging of spaces, a newline is a piece of its own, and a character
    without a piece falls back to its UTF-8 bytes. So bits per byte are those of the text itself.

    Args:
        lines: text, without newlines.

    Raises:
        InputError: the text is too small for that many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in lines if line),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            max_sentence_length=1 << 20,
            input_sentence_size=2_000_000,  # a random sample of longer corpora
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"SentencePiece cannot train {vocab_size} pieces on this corpus",
            found=" ".join(str(error).split()),
            do="use more text or a smaller model.vocab_size (262 pieces are taken by bytes and control symbols)",
        ) from error
    path.write_bytes(model.getvalue())


class Tokenizer:
    """A trained SentencePiece model."""

    def __init__(self, path: str | Path):
        """Raises InputError if `path` is missing or is not a SentencePiece model."""
        self.path = Path(path)
        if not self.path.is_file():
            do = "prepare the data first; of an imported model: import it with its tokenizer files beside its weights"
            raise InputError("tokenizer not found", where=self.path, do=do)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
        except RuntimeError as error:
            raise InputError("not a SentencePiece model", where=self.path, do="prepare the data again") from error
        self.vocab_size: int = self._pieces.get_piece_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.adds_bos = self.bos_id >= 0 and read_tokenizer_config(self.path.parent).get("add_bos_token") is not False
        self.end_ids = read_end_ids(self.path.parent, self.eos_id)

    def fits(self, vocab_size: int) -> bool:
        """Whether a model with that many rows in its embedding can use it."""
        return self.vocab_size == vocab_size

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of a text, preceded by the begin-of-document token if `bos` and this tokenizer adds one."""
        return [self.bos_id] * (bos and self.adds_bos) + self._pieces.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return self._pieces.encode(list(texts), num_threads=-1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control tokens (begin, end, padding) are left out."""
        return self._pieces.decode([int(i) for i in ids])

    def decode_after(self, ids: Sequence[int]) -> str:
        """Text of token ids that go on after other text: tokenizers that put a space before a text leave it out of what
        they decode, but here it stays."""
        anchor = self.encode("a")
        return self.decode([*anchor, *ids])[len(self.decode(anchor)) :]
