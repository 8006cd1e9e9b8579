"""Encodes text in which control tokens, such as `<|im_end|>`, stand as text.

A tokenizer's own `encode` never finds them in a text. A chat template writes them on purpose, so its output needs this.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from minillm_core.text.tokenizer import USER_DEFINED, ModelProto, Tokenizer, read_tokenizer_config
from minillm_core.text.tokenizer_json import JsonTokenizer

Token = tuple[int, int]
"""A token id, and the position in the text where the token ends."""

CONTROL, UNKNOWN = 3, 2
"""SentencePiece's types of the pieces that `encode` never finds in a text."""


class ControlTokens(ABC):
    """The control tokens of a tokenizer, and the ids of text with them, as `transformers` gives them."""

    ids: dict[str, int]
    """Control token, as text -> its id."""

    @abstractmethod
    def encode(self, text: str, *, follows: bool) -> list[Token]:
        """The tokens of a text; a control token in it becomes that token.

        Args:
            follows: the text follows other text, so no space is put before it.
        """

    @abstractmethod
    def encode_as_text(self, text: str) -> list[Token]:
        """The tokens of a text that follows other text. They are never control tokens."""


def matching(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts; the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or "(?!)")


def control_tokens(tokenizer: Tokenizer, template: str) -> ControlTokens:
    """Control tokens: those that the tokenizer calls special (SentencePiece: control), and those of its other added
    tokens (user-defined symbols) that the template contains, except white space."""
    if isinstance(tokenizer, JsonTokenizer):
        return _JsonControlTokens(tokenizer, template)
    return _PieceControlTokens(tokenizer, template)


def _in_template(token: str, template: str) -> bool:
    return token in template and not token.isspace()


class _JsonControlTokens(ControlTokens):
    def __init__(self, tokenizer: JsonTokenizer, template: str):
        data = tokenizer.data()
        for token in data["added_tokens"]:
            token["special"] = token["special"] or _in_template(token["content"], template)
        self.ids = {token["content"]: token["id"] for token in data["added_tokens"] if token["special"]}
        self._parsing, self._plain = (_load(data, encode_special_tokens=plain) for plain in (False, True))

    def encode(self, text: str, *, follows: bool) -> list[Token]:
        return self._after_line(self._parsing, text) if follows else _tokens(self._parsing, text)

    def encode_as_text(self, text: str) -> list[Token]:
        return self._after_line(self._plain, text)

    def _after_line(self, json_tokenizer: Any, text: str) -> list[Token]:
        """As `transformers` does: some tokenizers put a space before a text, but not before what follows a newline."""
        line, both = _tokens(json_tokenizer, "\n"), _tokens(json_tokenizer, "\n" + text)
        if both[: len(line)] == line:
            return [(i, end - 1) for i, end in both[len(line) :]]
        return _tokens(json_tokenizer, text)


def _load(data: dict[str, Any], *, encode_special_tokens: bool) -> Any:
    import tokenizers

    json_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    json_tokenizer.no_truncation()
    json_tokenizer.no_padding()
    json_tokenizer.encode_special_tokens = encode_special_tokens
    return json_tokenizer


def _tokens(json_tokenizer: Any, text: str) -> list[Token]:
    encoding = json_tokenizer.encode(text, add_special_tokens=False)
    return [(i, end) for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]


class _PieceControlTokens(ControlTokens):
    """SentencePiece. As in `transformers`, the space that some models put before a text comes only before the first
    part of it, or, with `legacy` in tokenizer_config.json, also after each control token."""

    def __init__(self, tokenizer: Tokenizer, template: str):
        proto = ModelProto.FromString(tokenizer.content)
        self.ids = {}
        for i, piece in enumerate(proto.pieces):
            if piece.type in (CONTROL, UNKNOWN) or (piece.type == USER_DEFINED and _in_template(piece.piece, template)):
                self.ids[piece.piece] = i
                piece.type = piece.type if piece.type == UNKNOWN else CONTROL
        self._pattern = matching(self.ids)
        self._first = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        proto.normalizer_spec.add_dummy_prefix = False
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._legacy = read_tokenizer_config(Path(tokenizer.path).parent).get("legacy") is True

    def encode(self, text: str, *, follows: bool) -> list[Token]:
        tokens: list[Token] = []
        start = 0
        for match in self._pattern.finditer(text):
            tokens += self._part(text, start, match.start(), follows)
            tokens.append((self.ids[match[0]], match.end()))
            start = match.end()
        return tokens + self._part(text, start, len(text), follows)

    def encode_as_text(self, text: str) -> list[Token]:
        return self._part(text, 0, len(text), follows=True)

    def _part(self, text: str, start: int, end: int, follows: bool) -> list[Token]:
        with_space = (self._legacy and start > 0) or not (follows or start > 0)
        found = (self._first if with_space else self._inner).encode(text[start:end], out_type="offset_mapping")
        tokens, at = [], end
        for i, (first, last) in zip(reversed(found["ids"]), reversed(found["offsets"]), strict=True):
            at = start + last if last > first else at  # the bytes of a character are empty, except the last one
            tokens.append((i, at))
        return tokens[::-1]
