"""Requests to a generator, checked before anything is computed."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.decoding.sampling import SamplingConfig, row_key, whole_number
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids. The begin-of-document token is put before a text, but not before token ids."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text that the model has already processed; it can be continued any number of times (see `prefill`)."""

    tokens: tuple[int, ...]
    state: Any = field(repr=False)
    """The decoding state of one row, with all tokens except the last in its cache."""
    generator: "RequestReader" = field(repr=False)


@dataclass
class Row:
    """A continuation in progress."""

    prompt: list[int]
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    end: tuple[int, float] | None = None
    """The token that ended it, if one did, and its log-probability."""
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class Request:
    """A checked request."""

    rows: list[Row]
    """One per continuation; the n samples of a prompt follow one another."""
    n: int
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    stop_ids: frozenset[int]
    prefix: Prefix | None
    sampling: SamplingConfig


class RequestReader:
    """Turns arguments into checked requests for a model and its tokenizer; raises InputError for bad arguments."""

    def __init__(self, model: Any, tokenizer: Tokenizer):
        """Raises InputError if the tokenizer has more tokens than the model's vocabulary."""
        self.config: ModelConfig = model.config
        self.tokenizer = tokenizer
        if not tokenizer.fits(self.config.vocab_size):
            raise InputError(
                "the tokenizer's vocabulary is larger than the model's",
                expected=f"at most {self.config.vocab_size} pieces",
                found=f"{tokenizer.vocab_size} pieces",
                where=tokenizer.path,
                hint="use the tokenizer.model of the run that trained the model",
            )

    def request(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        n: int = 1,
        stop: str | int | Sequence[str | int] = (),
        truncate: bool = False,
        prefix: Prefix | None = None,
        least_new_tokens: int = 1,
        **sampling: Any,
    ) -> Request:
        """A checked request; arguments and errors are those of `BaseGenerator.generate`."""
        self._check_list(prompts)
        known = [field.name for field in fields(SamplingConfig)]
        if unknown := sorted(sampling.keys() - known):
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else None
            raise InputError("unknown option", expected=", ".join(known), found=", ".join(unknown), hint=hint)
        config = SamplingConfig(**sampling)
        max_new_tokens, n = whole_number("max_new_tokens", max_new_tokens), whole_number("n", n)
        for name, value, least in (("max_new_tokens", max_new_tokens, least_new_tokens), ("n", n, 1)):
            if value < least:
                raise InputError(f"{name} is out of range", expected=f"{least} or more", found=value)
        if prefix is not None and getattr(prefix, "generator", None) is not self:
            hint = "use what this generator's `prefill` returned"
            raise InputError(
                "not a prefix of this generator", expected="a Prefix", found=type(prefix).__name__, hint=hint
            )
        stops = tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
        if "" in stops:
            raise InputError("a stop string is empty", expected="at least one character", found=stops)
        stop_ids = [whole_number("stop", item) for item in stops if not isinstance(item, str)]
        self._check_ids(stop_ids, "stop")
        room = self.config.context_length - max_new_tokens
        rows = []
        for i, prompt in enumerate(prompts):
            before = [] if prefix is None else list(prefix.tokens)
            tokens = self._encode(prompt, bos=not before, may_be_empty=bool(before), where=f"prompt {i + 1}")
            if truncate and room > len(before):
                tokens = tokens[-(room - len(before)) :]
            self._check_fits(len(before) + len(tokens), max_new_tokens, where=f"prompt {i + 1}")
            tokens = before + tokens
            rows += [Row(tokens, row_key(tokens, sample)) for sample in range(n)]
        stop_strings = tuple(item for item in stops if isinstance(item, str))
        ends = self.tokenizer.end_ids.union(stop_ids)
        return Request(rows, n, max_new_tokens, stop_strings, ends, prefix, config)

    def _encode(self, prompt: Prompt, *, bos: bool, where: str, may_be_empty: bool = False) -> list[int]:
        if not isinstance(prompt, (str, Sequence, np.ndarray)):
            raise InputError("not a prompt", expected="text or a list of token ids", found=repr(prompt), where=where)
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise InputError("not Unicode text", found=error, where=where) from error
            ids = self.tokenizer.encode(prompt, bos=bos)
        else:
            ids = [whole_number("a token id", token) for token in prompt]
        if not (len(prompt) and ids) and not may_be_empty:  # a text of spaces may have no tokens
            hint = (
                f"to start from nothing, pass the token ids [{self.tokenizer.bos_id}] (begin of document) as the prompt"
            )
            raise InputError("empty prompt", expected="at least one token", found=repr(prompt), where=where, hint=hint)
        self._check_ids(ids, where)
        return ids

    def _check_list(self, prompts: Sequence[Prompt]) -> None:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):
            raise InputError("not a list of texts", expected="a list of at least one text", found=repr(prompts))

    def _check_ids(self, ids: list[int], where: str) -> None:
        for i, token in enumerate(ids, 1):
            if not 0 <= token < self.config.vocab_size:
                expected, found = f"0 to {self.config.vocab_size - 1}", f"{token} (number {i} of {len(ids)})"
                raise InputError("token id outside the vocabulary", expected=expected, found=found, where=where)

    def _check_fits(self, n_tokens: int, max_new_tokens: int, where: str | None = None) -> None:
        limit = self.config.context_length
        if n_tokens + max_new_tokens > limit:
            raise InputError(
                "the text and its continuation are longer than the context",
                expected=f"at most {limit} tokens",
                found=f"{n_tokens} tokens + {max_new_tokens} new ones",
                where=where,
                hint=f"ask for at most {limit - n_tokens} new tokens"
                if max_new_tokens >= limit > n_tokens
                else f"shorten it, ask for at most {limit - n_tokens} new tokens, or let `generate` truncate it"
                if n_tokens < limit and max_new_tokens
                else "shorten it, or let `generate` truncate it",
            )
