"""SentencePiece: encode, decode. decode(encode(text)) == text for every text without U+2581."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from minillm_core.errors import InputError
from minillm_core.files import hash_file

ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # created at import

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
USER_DEFINED = 4
"""SentencePiece's type of a symbol that is always one piece."""

TOKENIZER_MODEL, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATE, CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_FILES = (
    TOKENIZER_MODEL,
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    GENERATION_CONFIG,
    CHAT_TEMPLATE,
)
"""Tokenizer files stored with a model: only the first one for models trained here, any of them for imported models."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer files that exist in `source`, including additional chat templates."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for path in (source / CHAT_TEMPLATES).glob("*.jinja"):
        (folder / CHAT_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / CHAT_TEMPLATES / path.name)


def hash_tokenizer(folder: Path) -> str:
    """SHA-256 of the tokenizer files in a folder. If tokenizer.model is the only one, it is that of the file."""
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    paths += sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))
    hashes = {path.name: hash_file(path) for path in paths}
    if hashes.keys() == {TOKENIZER_MODEL}:
        return hashes[TOKENIZER_MODEL]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def read_tokenizer_config(folder: Path, name: str = TOKENIZER_CONFIG) -> dict[str, Any]:
    """The JSON object in tokenizer_config.json, or in a different file of that folder; empty if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / name
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(data, dict):
            raise ValueError(type(data).__name__)
        json.dumps(data, ensure_ascii=False).encode()  # fails for a lone surrogate, which is not text
    except (ValueError, RecursionError) as error:
        hint = "get the file again, or remove it"
        raise InputError("damaged file", expected="a JSON object", found=error, where=path, hint=hint) from error
    return data


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; empty if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    data = read_tokenizer_config(folder, GENERATION_CONFIG)
    check_special_ids(data, folder / GENERATION_CONFIG)
    return data


def check_special_ids(data: dict[str, Any], where: Path) -> None:
    """Raises InputError if a special id of a configuration is not an int, a list of ints, or null."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = data.get(name)
        if not all(i is None or type(i) is int for i in (ids if isinstance(ids, list) else [ids])):
            expected, hint = "an id, a list of ids, or null", "correct it, or get the file again"
            raise InputError(f"not token ids: {name}", expected=expected, found=repr(ids)[:60], where=where, hint=hint)


def read_end_ids(folder: Path, eos_id: int) -> frozenset[int]:
    """The tokens that end a text: as in transformers, those in generation_config.json, or `eos_id` if it has none."""
    ids = read_generation_config(folder).get("eos_token_id")
    return frozenset(ids if isinstance(ids, list) and ids else [eos_id if ids in (None, []) else ids])


class Tokenizer:
    """A trained SentencePiece model. If tokenizer_config.json in the same folder sets `add_bos_token` or
    `add_prefix_space` to false, this is respected."""

    content: bytes
    """The serialised model, with `add_prefix_space` applied."""

    def __init__(self, path: str | Path):
        """Raises InputError if `path` is missing or is not a SentencePiece model."""
        self.path = Path(path)
        if not self.path.is_file():
            hint = (
                "prepare the data first; for an imported model: import it with the tokenizer files next to the weights"
            )
            raise InputError("tokenizer not found", where=self.path, hint=hint)
        try:
            settings = read_tokenizer_config(self.path.parent)
            self.content = self.path.read_bytes()
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self.content)
            if settings.get("add_prefix_space") is False:
                proto = ModelProto.FromString(self.content)
                proto.normalizer_spec.add_dummy_prefix = False
                self.content = proto.SerializeToString()
                self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        except RuntimeError as error:
            raise InputError("not a SentencePiece model", where=self.path, hint="prepare the data again") from error
        self.vocab_size: int = self._pieces.get_piece_size()
        self.unknown_id: int | None = self._pieces.unk_id()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.adds_bos = self.bos_id >= 0 and settings.get("add_bos_token") is not False
        self.end_ids = read_end_ids(self.path.parent, self.eos_id)

    def fits(self, vocab_size: int) -> bool:
        """Whether a model of this vocabulary size can use it. Imported models may have unused embedding rows."""
        return self.vocab_size <= vocab_size

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of a text, preceded by the begin-of-document token if `bos` and this tokenizer adds one."""
        return [self.bos_id] * (bos and self.adds_bos) + self._pieces.encode(text)

    def encode_many(self, texts: Sequence[str], n_threads: int = -1) -> list[list[int]]:
        """Token ids of each text. -1: one thread for every CPU."""
        return self._pieces.encode(list(texts), num_threads=n_threads)

    @property
    def splits_at_newlines(self) -> bool:
        """Whether the ids of a text are those of its lines, one after the other."""
        proto = ModelProto.FromString(self.content)
        normalizer = proto.normalizer_spec
        is_unchanged = normalizer.name == "identity" and not normalizer.precompiled_charsmap
        adds_nothing = not (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces)
        return is_unchanged and adds_nothing and any(p.piece == "\n" and p.type == USER_DEFINED for p in proto.pieces)

    def encode_after(self, before: str, text: str) -> list[int]:
        """Token ids of a text that follows `before`, so without the space that some tokenizers put before a text."""
        first, both = self.encode(before), self.encode(before + text)
        return both[len(first) :] if both[: len(first)] == first else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens (begin, end, padding) and ids outside the tokenizer."""
        return self._pieces.decode([int(i) for i in ids if i < self.vocab_size])

    def piece(self, id: int) -> str:
        """The name of a token in the vocabulary, such as `</s>` or `<0x0A>`."""
        return str(self._pieces.id_to_piece(id)) if 0 <= id < self.vocab_size else f"<unused {id}>"

    def decode_after(self, ids: Sequence[int]) -> str:
        """Text of token ids that follow earlier text. A tokenizer that adds a space before every text removes the first
        space when it decodes; here it is kept."""
        anchor = self.encode("a")
        return self.decode([*anchor, *ids])[len(self.decode(anchor)) :]
