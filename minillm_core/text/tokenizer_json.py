"""tokenizer.json, the format of the `tokenizers` package: uses imported files, and exports our own tokenizers.

A SentencePiece BPE model and the `tokenizer.json` made from it give the same ids for every text.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minillm_core.errors import InputError, missing_package
from minillm_core.text.tokenizer import (
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    ModelProto,
    Tokenizer,
    copy_tokenizer,
    read_end_ids,
    read_tokenizer_config,
)

SPACE = "\u2581"

_Piece = ModelProto.SentencePiece


class JsonTokenizer(Tokenizer):
    """An imported tokenizer.json. In the same folder, tokenizer_config.json or special_tokens_map.json names the begin-
    and end-of-document tokens."""

    def __init__(self, path: str | Path):
        """Raises InputError if `path` is missing or damaged, or no end-of-document token is named."""
        self.path = Path(path)
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise missing_package(error, "hf", where=self.path) from error
        with self._damage():
            text = self.path.read_text(encoding="utf-8")
            _check_merges(json.loads(text)["model"])
            self._json = tokenizers.Tokenizer.from_str(text)
        settings = read_tokenizer_config(self.path.parent, SPECIAL_TOKENS_MAP) | read_tokenizer_config(self.path.parent)
        bos, eos = (self._named(settings.get(key)) for key in ("bos_token", "eos_token"))
        if eos is None:
            expected, found = "an eos_token that is in tokenizer.json", settings.get("eos_token")
            where, hint = self.path.parent / TOKENIZER_CONFIG, "set eos_token to the token that ends a document"
            raise InputError("no end-of-document token", expected=expected, found=found, where=where, hint=hint)
        self._json.no_truncation()
        self._json.no_padding()
        self._json.encode_special_tokens = True  # text never yields special tokens; those are given as ids
        self.vocab_size = max(self.vocabulary().values()) + 1
        self.unknown_id = self._named(json.loads(text)["model"].get("unk_token"))
        self.bos_id, self.eos_id = eos if bos is None else bos, eos
        self.end_ids = read_end_ids(self.path.parent, eos)
        with self._damage():
            plain, framed = (self._json.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = [at for at in range(len(framed)) if framed[at : at + len(plain)] == plain]
        self._before: list[int] = framed[: starts[0]] if starts else []
        self.adds_bos = self._before == [self.bos_id]
        if unknown := set(self._before) - set(self.vocabulary().values()):
            hint = "correct the ids in its post_processor, or get the file again"
            found = f"token ids that it does not have: {', '.join(map(str, sorted(unknown)))}"
            raise InputError("damaged tokenizer: what it puts before a text", found=found, where=self.path, hint=hint)

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        """Turns every error of the package into an InputError, also Rust panics, which are only BaseExceptions."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            hint = "get tokenizer.json again"
            raise InputError(
                "missing or damaged tokenizer", found=str(error)[:200], where=self.path, hint=hint
            ) from error

    def vocabulary(self) -> dict[str, int]:
        """The id of every token, including added tokens."""
        vocabulary: dict[str, int] = self._json.get_vocab()
        return vocabulary

    def data(self) -> dict[str, Any]:
        """The content of tokenizer.json, without truncation and padding."""
        data: dict[str, Any] = json.loads(self._json.to_str())
        return data

    def _named(self, token: Any) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return self._json.token_to_id(content) if isinstance(content, str) else None

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of a text; `bos` adds the tokens that this tokenizer puts before a document (perhaps none), but not
        those that it puts after one."""
        with self._damage():
            return self._before * bos + self._json.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str], n_threads: int = -1) -> list[list[int]]:
        # TOKENIZERS_PARALLELISM=false in the environment means one thread
        with self._damage():
            return [encoding.ids for encoding in self._json.encode_batch(list(texts), add_special_tokens=False)]

    @property
    def splits_at_newlines(self) -> bool:
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens and ids outside the tokenizer."""
        with self._damage():
            text: str = self._json.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)
        return text


def _check_merges(model: dict[str, Any]) -> None:
    """Raises ValueError if the second token of a merge lacks `continuing_subword_prefix`.

    The package removes the prefix without this check. If that cuts a character in two, the process ends.
    """
    if prefix := model.get("continuing_subword_prefix"):
        for merge in model["merges"]:
            if not (merge.split(" ", 1) if isinstance(merge, str) else merge)[1].startswith(prefix):
                raise ValueError(f"the second token of the merge {merge!r} does not begin with {prefix!r}")


PROBES = ("", " x", "  two  spaces ", "\t\n\n", "e\u0301\u00e9 \u65e5\U0001f469\u200d\U0001f467", "</s><s>", "1234567")
"""Texts that show a difference between two tokenizers, if there is one."""


def contradicting(folder: Path) -> bool:
    """Whether a folder has a SentencePiece model and a tokenizer.json, both readable, that give different ids."""
    try:
        one, other = Tokenizer(folder / TOKENIZER_MODEL), JsonTokenizer(folder / TOKENIZER_JSON)
    except InputError:
        return False
    pieces = (piece.piece for piece in ModelProto.FromString(one.content).pieces)
    vocabulary = other.vocabulary()
    return any(vocabulary.get(piece, i) != i for i, piece in enumerate(pieces)) or any(
        one.encode(text, bos=True) != other.encode(text, bos=True) for text in (*PROBES, "The United States of America")
    )


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run or a checkpoint.

    If both files exist, the SentencePiece model is used only if it can be read and has `vocab_size` tokens; otherwise
    tokenizer.json is used.

    Raises:
        InputError: there is none, or it is damaged.
    """
    folder = Path(folder)
    if not (folder / TOKENIZER_JSON).is_file():
        return Tokenizer(folder / TOKENIZER_MODEL)
    if (folder / TOKENIZER_MODEL).is_file():
        with contextlib.suppress(InputError):  # Llama 3's tokenizer.model has a different format
            tokenizer = Tokenizer(folder / TOKENIZER_MODEL)
            if tokenizer.vocab_size == vocab_size:
                return tokenizer
    return JsonTokenizer(folder / TOKENIZER_JSON)


def collect_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer into an empty folder.

    Args:
        source: a SentencePiece model, a tokenizer.json (with its settings, in the same folder), or a folder with one.

    Raises:
        InputError: there is no tokenizer at this path.
    """
    if source.is_dir():
        copy_tokenizer(source, folder)
    elif source.is_file() and source.suffix.lower() == ".json":
        copy_tokenizer(source.parent, folder)
        (folder / TOKENIZER_MODEL).unlink(missing_ok=True)
        shutil.copyfile(source, folder / TOKENIZER_JSON)
    elif source.is_file():
        shutil.copyfile(source, folder / TOKENIZER_MODEL)
    expected = f"a SentencePiece model, a {TOKENIZER_JSON}, or a folder with one"
    if not any((folder / name).is_file() for name in (TOKENIZER_MODEL, TOKENIZER_JSON)):
        raise InputError("no tokenizer", expected=expected, where=source, hint="check the path")
    try:
        load_tokenizer(folder, sys.maxsize)
    except InputError as error:
        problem = str(error).splitlines()[0]
        raise InputError("not a tokenizer", expected=expected, found=problem, where=source) from error


def bos_template(token: str, id: int) -> dict[str, Any]:
    """The post-processor that puts a token before each text."""
    begin, pair = ({"SpecialToken": {"id": token, "type_id": i}} for i in range(2))
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, pair, second],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def special_tokens(content: bytes) -> dict[str, str]:
    """The special tokens of a SentencePiece model, by their names in tokenizer_config.json."""
    proto = ModelProto.FromString(content)
    ids = {name: getattr(proto.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    return {f"{name}_token": proto.pieces[i].piece for name, i in ids.items() if 0 <= i < len(proto.pieces)}


def sentencepiece_to_json(content: bytes, adds_bos: bool) -> dict[str, Any] | None:
    """The tokenizer.json of a SentencePiece model; None if the model is of an unsupported kind.

    Models from `train_tokenizer` are supported, and models like Llama 2's, which put a space before every text.

    SentencePiece always makes the merge whose piece has the best score. So the merges here are all splits of every
    normal piece into two normal pieces, best score first. User-defined pieces are matched before any merge.
    """
    proto = ModelProto.FromString(content)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    if (
        trainer.model_type != trainer.BPE
        or not trainer.byte_fallback
        or normalizer.remove_extra_whitespaces
        or normalizer.precompiled_charsmap
        or any(piece.type == _Piece.UNUSED for piece in proto.pieces)
        or any(piece.type == _Piece.USER_DEFINED and {" ", SPACE} & {*piece.piece} for piece in proto.pieces)
        # `tokenizers` would put the space after each of these pieces too
        or (normalizer.add_dummy_prefix and any(piece.type == _Piece.USER_DEFINED for piece in proto.pieces))
    ):
        return None
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    merges = [
        (score, vocab[piece[:at]], vocab[piece[at:]], [piece[:at], piece[at:]])
        for piece, score in normal.items()
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    special = (_Piece.CONTROL, _Piece.UNKNOWN)
    added = [
        {
            "id": i,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type in special,
        }
        for i, piece in enumerate(proto.pieces)
        if piece.type in (*special, _Piece.USER_DEFINED)
    ]
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer.add_dummy_prefix:
        spaces = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": spaces,
        "pre_tokenizer": None,
        "post_processor": bos_template(proto.pieces[trainer.bos_id].piece, trainer.bos_id) if adds_bos else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.pieces[trainer.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [merge[3] for merge in merges],
        },
    }
