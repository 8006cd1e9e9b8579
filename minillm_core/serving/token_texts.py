"""The text of single tokens."""

from minillm_core.text.tokenizer import Tokenizer


class TokenTexts:
    """Names tokens by their text, or by their name in the vocabulary if they have no text of their own: control tokens,
    and tokens that are a part of a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            text = self._tokenizer.decode_after([token])
            self._texts[token] = self._tokenizer.piece(token) if not text or "\ufffd" in text else text
        return self._texts[token]

    def bytes_of(self, token: int) -> list[int] | None:
        """The UTF-8 bytes of a token's text; None if it is not whole characters."""
        text = self._tokenizer.decode_after([token])
        return None if "\ufffd" in text else list(text.encode())


class TextDecoder:
    """Tells what each token of a text adds to it, in whole characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._incomplete: list[int] = []
        self._n_chars = 0
        self.start = 0
        """Where the text of the last token begins, in characters."""

    def add(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        before = ""
        if self._incomplete and "\ufffd" not in self._tokenizer.decode_after([token]):
            before = self._take()  # bytes that are no character
        self.start = self._n_chars
        self._incomplete.append(token)
        if self._tokenizer.decode_after(self._incomplete).endswith("\ufffd") and len(self._incomplete) < 4:
            return before  # a character has at most four bytes
        return before + self._take()

    def _take(self) -> str:
        text = self._tokenizer.decode_after(self._incomplete)
        self._incomplete = []
        self._n_chars += len(text)
        return text
