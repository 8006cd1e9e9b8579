"""Text generation, the part that needs no framework: batches rows, draws random numbers, cuts and streams text.

Each framework's Generator adds the device functions.

Shapes: B rows, T prompt tokens, N tokens per block, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from minillm_core.decoding.requests import Prefix, Prompt, Request, RequestReader, Row
from minillm_core.decoding.sampling import Filters, uniforms
from minillm_core.errors import InputError
from minillm_core.progress import progress

BLOCK = 16
"""Tokens decoded per host synchronisation."""
STREAM_BLOCK = 4
"""The same while a text is streamed."""
PREFILL_CHUNK = 512
"""Prompt tokens of every row that the model processes per call."""
SCORE_TOKENS = 2048
"""Tokens scored per call, all rows together. This limits the memory that the logits take."""


def bucket(n: int, limit: int, smallest: int = 16) -> int:
    """Rounds n up to 16, 24, 32, 48, 64, 96 ..., at most to `limit`: few different shapes, so few compilations."""
    power = max(smallest, 1 << (n - 1).bit_length())
    return min(power * 3 // 4 if n <= power * 3 // 4 and power > smallest else power, limit)


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    text: str
    """Up to the end of the document or the first stop, without the stop and without an incomplete last character."""
    tokens: list[int]
    """Without the end-of-document or stop token, but with the tokens of a stop string."""
    logprobs: list[float]
    """Natural log-probability of each token under the model, before penalty, temperature and filters."""
    finish_reason: Literal["stop", "length"]


class BaseGenerator(RequestReader, ABC):
    """Generates and scores text. The same request gives the same tokens in both frameworks.

    A row's tokens depend only on its prompt, the options and the seed, not on the other rows. So equal prompts in one
    call give equal texts; for different texts of one prompt, ask for `n` samples.
    """

    @abstractmethod
    def _new_state(self, n_rows: int, capacity: int) -> Any:
        """The decoding state of empty rows: logits (B, V) of the next token, and a cache."""

    @abstractmethod
    def _take_rows(self, state: Any, rows_B: np.ndarray, capacity: int) -> Any:
        """A new state with the given rows, in the given order; a row may be repeated. `state` does not change."""

    @abstractmethod
    def _put_row(self, state: Any, row: int, one_row: Any) -> Any:
        """The state with one of its rows replaced by a state of one row and the same capacity. Consumes `state`."""

    @abstractmethod
    def _next_logits(self, state: Any, row: int) -> np.ndarray:
        """Logits (V,) of a row's next token, at least float32."""

    @abstractmethod
    def _prefill(self, state: Any, tokens_BT: np.ndarray, valid_B: np.ndarray) -> Any:
        """Runs the first valid_B tokens (int32) of every row; rows with none keep their logits. Consumes `state`."""

    @abstractmethod
    def _prefill_logits(self, state: Any, tokens_BT: np.ndarray, valid_B: np.ndarray) -> tuple[np.ndarray, Any]:
        """`_prefill` that also returns the logits (B, T, V) after every token, at least float32."""

    @abstractmethod
    def _decode(
        self,
        state: Any,
        seen_BV: np.ndarray,
        uniforms_BN: np.ndarray,
        active_B: np.ndarray,
        n_tokens: int,
        filters: Filters,
        *,
        greedy: bool,
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        """Samples n_tokens tokens (at most N) for every active row. Consumes `state`. The other rows become empty; what
        is returned for them is meaningless.

        Args:
            greedy: every row takes the most likely token: a faster program.

        Returns:
            tokens (B, n_tokens), their log-probabilities under the model (NaN if its logits are not finite), and the
            new state.
        """

    @abstractmethod
    def _losses(self, rows: np.ndarray) -> np.ndarray:
        """Negative log-likelihood in nats (B, T) of every token except the first, of rows (B, T + 1)."""

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, logprobs: Literal[False] = False, **options: Any
    ) -> list[str]: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, logprobs: Literal[True], **options: Any
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        n: int = 1,
        stop: str | int | Sequence[str | int] = (),
        truncate: bool = False,
        prefix: Prefix | None = None,
        logprobs: bool = False,
        **sampling: Any,
    ) -> list[str] | list[Completion]:
        """The continuation of each prompt, without the prompt, up to the end-of-document token or a stop.

        Args:
            prompts: texts or token ids, of any lengths.
            max_new_tokens: maximum number of tokens per continuation.
            n: continuations per prompt; they follow one another in the result.
            stop: strings and token ids that end a continuation; they are left out of its text.
            truncate: drop the beginning of a prompt that does not fit into the context with its continuation;
                otherwise such a prompt is an error.
            prefix: the result of `prefill`, which comes before every prompt; the prompts may then be empty.
            logprobs: return Completion objects (with tokens and log-probabilities) instead of texts.
            **sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed (see SamplingConfig).

        Raises:
            InputError: no prompt, an empty prompt, one that does not fit, ids outside the vocabulary, an option out of
                range (all before anything is computed); or the model's logits are not finite.
        """
        request = self.request(prompts, max_new_tokens, n, stop, truncate, prefix, **sampling)
        for _ in self._run(request, BLOCK):
            pass
        completions = [self._completion(row, request) for row in request.rows]
        return completions if logprobs else [completion.text for completion in completions]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        stop: str | int | Sequence[str | int] = (),
        truncate: bool = False,
        prefix: Prefix | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The continuation of one prompt, in pieces of whole characters, as it is decoded. Together the pieces are the
        text that `generate` returns. Arguments and errors are those of `generate`; bad arguments raise at the call, not
        at the first piece."""
        if isinstance(prompt, (list, tuple)) and any(isinstance(item, str) for item in prompt):
            expected, hint = "a text or token ids", "pass one text, or use `generate` for several"
            raise InputError("stream takes one prompt", expected=expected, found=repr(prompt)[:60], hint=hint)
        request = self.request([prompt], max_new_tokens, stop=stop, truncate=truncate, prefix=prefix, **sampling)
        return self._pieces(request)

    def check(self, prompts: Sequence[Prompt], *, max_new_tokens: int, logprobs: bool = False, **options: Any) -> None:
        """Raises the InputError that `generate` would raise for these arguments; computes nothing."""
        self.request(prompts, max_new_tokens, **options)

    def prefill(self, prompt: Prompt) -> Prefix:
        """Runs a text through the model once, so that `generate` and `stream` can put it before any number of prompts.

        The text and the prompts are tokenised separately.

        Raises:
            InputError: the text is empty or leaves no room for a new token in the context.
        """
        tokens = self._encode(prompt, bos=True, where="the prefix")
        self._check_fits(len(tokens), 1)
        capacity = bucket(len(tokens), self.config.context_length)
        state = self._prefill_rows(self._new_state(1, capacity), [tokens[:-1]], 0, capacity)
        return Prefix(tuple(tokens), state, self)

    def score(self, texts: Sequence[Prompt]) -> list[np.ndarray]:
        """Natural log-probability of every token of each text, given all tokens before it: float arrays, one number per
        token of `tokenizer.encode(text)`. For token ids, the first id is only context and is not scored.

        Raises:
            InputError: no text, an empty text, one longer than the context, ids outside the vocabulary; or the model's
                logits are not finite.
        """
        self._check_list(texts)
        ids = [self._encode(text, bos=True, where=f"text {i + 1}") for i, text in enumerate(texts)]
        for i, tokens in enumerate(ids):
            if len(tokens) < 2:
                raise InputError(
                    "nothing to score", expected="at least two token ids", found=tokens, where=f"text {i + 1}"
                )
            self._check_fits(len(tokens) - 1, 0, where=f"text {i + 1}")
        scores: list[np.ndarray] = [np.empty(0)] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with progress("scoring", sum(map(len, ids)) - len(ids), "token") as work:
            while order:
                width = bucket(len(ids[order[-1]]) - 1, self.config.context_length)
                n_rows = max(1, SCORE_TOKENS // width)
                group, order = order[-n_rows:], order[:-n_rows]
                rows = _padded([ids[i] for i in group], _batch_size(len(group)), width + 1)
                for i, losses in zip(group, self._losses(rows), strict=False):
                    scores[i] = -losses[: len(ids[i]) - 1]
                    check_finite(scores[i], f"text {i + 1}")
                    work.advance(len(scores[i]))
        return scores

    def _run(self, request: Request, block: int) -> Iterator[None]:
        """Decodes `block` tokens of every unfinished row at a time. Drops finished rows once they are half."""
        rows: list[Row | None] = [*request.rows]
        capacity = bucket(
            max(len(row.prompt) for row in request.rows) + request.max_new_tokens, self.config.context_length
        )
        state = self._begin(request, capacity)
        done = 0
        while done < request.max_new_tokens:
            count = min(block, request.max_new_tokens - done)
            n_rows = _batch_size(len(rows))
            noise_BN = np.zeros((n_rows, BLOCK), np.float32)
            seen_BV = np.zeros((n_rows, self.config.vocab_size), bool)
            for i, row in enumerate(rows):
                if row and request.sampling.temperature != 0:
                    noise_BN[i] = uniforms(request.sampling.seed, row.key, len(row.prompt) + done, BLOCK)
                if row and request.sampling.repetition_penalty != 1:
                    seen_BV[i, row.prompt + row.tokens] = True
            active_B = np.array([row is not None for row in rows] + [False] * (n_rows - len(rows)))
            filters = Filters.of([request.sampling] * n_rows, self.config.vocab_size)
            tokens_BN, logprobs_BN, state = self._decode(
                state, seen_BV, noise_BN, active_B, count, filters, greedy=request.sampling.temperature == 0
            )
            for i, row in enumerate(rows):
                if row:
                    self._extend(row, tokens_BN[i].tolist(), logprobs_BN[i].tolist(), request)
                    rows[i] = None if row.finish_reason else row
            done += count
            yield
            active = [i for i, row in enumerate(rows) if row]
            if not active:
                return
            if 2 * len(active) <= len(rows):
                state = self._take_rows(state, _padded([active], 1, _batch_size(len(active)))[0], capacity)
                rows = [rows[i] for i in active]

    def _begin(self, request: Request, capacity: int) -> Any:
        """The state of all rows before their first new token. What samples and prompts share is computed once."""
        prompts = [row.prompt for row in request.rows[:: request.n]]
        n_rows, cached = _batch_size(len(prompts)), 0
        if request.prefix is None:
            state = self._new_state(n_rows, capacity)
        else:
            state = self._take_rows(request.prefix.state, np.zeros(n_rows, int), capacity)
            cached = len(request.prefix.tokens) - 1
        state = self._prefill_rows(state, [prompt[cached:] for prompt in prompts], cached, capacity)
        if request.n > 1:
            rows = np.repeat(np.arange(len(prompts)), request.n).tolist()
            state = self._take_rows(state, _padded([rows], 1, _batch_size(len(rows)))[0], capacity)
        return state

    def _prefill_rows(self, state: Any, tokens: list[list[int]], cached: int, capacity: int) -> Any:
        """Runs more tokens of every row, at most PREFILL_CHUNK per call."""
        longest = max(map(len, tokens))
        for start in range(0, longest, PREFILL_CHUNK):
            width = bucket(min(longest - start, PREFILL_CHUNK), capacity - cached - start)
            pieces = [row[start : min(start + PREFILL_CHUNK, start + width)] for row in tokens]
            n_rows = _batch_size(len(tokens))
            valid_B = np.array([len(piece) for piece in pieces] + [0] * (n_rows - len(pieces)), np.int32)
            state = self._prefill(state, _padded(pieces, n_rows, width), valid_B)
        return state

    def _extend(self, row: Row, tokens: list[int], logprobs: list[float], request: Request) -> None:
        """Adds a block of tokens to a row, up to the row's end."""
        n_before = len(row.tokens)
        for token, logprob in zip(tokens, logprobs, strict=True):
            if not math.isfinite(logprob):  # `check_finite` takes 4 us, which is long for every token of every row
                check_finite(logprob, f"new token {len(row.tokens) + 1}")
            if token in request.stop_ids:
                row.finish_reason, row.end = "stop", (token, logprob)
                break
            row.tokens.append(token)
            row.logprobs.append(logprob)
        if request.stop_strings and _find(self._text(row.tokens), request.stop_strings) is not None:
            for n_tokens in range(n_before + 1, len(row.tokens) + 1):
                if _find(self._text(row.tokens[:n_tokens]), request.stop_strings) is not None:
                    row.tokens, row.logprobs = row.tokens[:n_tokens], row.logprobs[:n_tokens]
                    row.finish_reason, row.end = "stop", None
                    break
        if row.finish_reason is None and len(row.tokens) == request.max_new_tokens:
            row.finish_reason = "length"

    def _text(self, tokens: list[int]) -> str:
        """The text of the tokens so far, without an incomplete last character."""
        return self.tokenizer.decode_after(tokens).rstrip("\ufffd")

    def _completion(self, row: Row, request: Request) -> Completion:
        assert row.finish_reason is not None  # the row is finished
        text = shown(self._text(row.tokens), request.stop_strings, ended=True)
        return Completion(text, row.tokens, row.logprobs, row.finish_reason)

    def _pieces(self, request: Request) -> Iterator[str]:
        row, n_sent = request.rows[0], 0
        for _ in self._run(request, STREAM_BLOCK):
            text = shown(self._text(row.tokens), request.stop_strings, ended=row.finish_reason is not None)
            if len(text) > n_sent:
                yield text[n_sent:]
                n_sent = len(text)


def shown(text: str, stop: Sequence[str], ended: bool) -> str:
    """The part of a text that can be shown: no stop string and, before the end, no suffix that may become one."""
    if (end := _find(text, stop)) is not None:
        return text[:end]
    return text if ended else text[: min((_possible_start(text, s) for s in stop), default=len(text))]


def _possible_start(text: str, stop: str) -> int:
    """Where the first suffix of the text begins that a stop string begins with. A stop string can be long, so this
    compares only where its first character is."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)


def _find(text: str, stop: Sequence[str]) -> int | None:
    """Position of the first stop string, or None."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=None)


def check_finite(logprobs: Any, where: str) -> None:
    if not np.isfinite(logprobs).all():
        hint = "check the checkpoint for NaN or infinite weights, or use a higher precision"
        raise InputError("the model's logits are not finite", where=where, hint=hint)


def _batch_size(n_rows: int) -> int:
    """Rounds a number of rows up to 1, 2, 3, 4, 6, 8, 12, 16 ..."""
    return bucket(n_rows, 1 << 62, smallest=1) if n_rows > 2 else n_rows


def _padded(rows: Sequence[Sequence[int]], n_rows: int, width: int) -> np.ndarray:
    """The rows as int32 (n_rows, width), padded with zeros on the right and at the bottom."""
    out = np.zeros((n_rows, width), np.int32)
    for target, row in zip(out, rows, strict=False):
        target[: len(row)] = row
    return out
