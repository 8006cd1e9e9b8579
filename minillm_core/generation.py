"""Text generation, the framework-free half: requests checked, rows batched, noise drawn, text cut and streamed.

Each framework's Generator adds the device functions.

Shapes: B rows, T prompt tokens, N tokens of a block, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.sampling import SamplingConfig, row_key, uniforms, whole_number
from minillm_core.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids taken as they are (a text's begin with the begin-of-document token)."""

BLOCK = 16
"""Tokens decoded on the device between two looks of the host."""
STREAM_BLOCK = 4
"""The same while somebody reads along."""
PREFILL_CHUNK = 512
"""Prompt tokens of every row that go through the model at once."""
SCORE_TOKENS = 2048
"""Tokens scored at once, all rows together; their logits are the memory it takes."""


def bucket(n: int, limit: int, smallest: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96 ... up from n, at most `limit`: few different shapes, few compilations."""
    power = max(smallest, 1 << (n - 1).bit_length())
    return min(power * 3 // 4 if n <= power * 3 // 4 and power > smallest else power, limit)


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    text: str
    """Up to the end of the document or the first stop, which is left out, as is a character cut in half at the end."""
    tokens: list[int]
    """Without the end-of-document or stop token; with those that make up a stop string."""
    logprobs: list[float]
    """ln p of each token under the model itself, before penalty, temperature and filters."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text that has been through the model, to be continued any number of times (see `prefill`)."""

    tokens: tuple[int, ...]
    state: Any = field(repr=False)
    """The decoding state of one row, with all tokens but the last in its cache."""
    generator: "BaseGenerator" = field(repr=False)


@dataclass
class _Row:
    """A continuation on its way."""

    prompt: list[int]
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class _Request:
    """What is to be done, checked."""

    rows: list[_Row]
    """The n samples of a prompt one after the other."""
    n: int
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    stop_ids: frozenset[int]
    prefix: Prefix | None
    sampling: SamplingConfig


class BaseGenerator(ABC):
    """Generates and scores text. The same request gives the same tokens in both frameworks.

    A row's tokens depend on its prompt, the options and the seed alone, not on the rows beside it: equal prompts in one
    call give equal texts (for different ones ask for `n` samples).
    """

    def __init__(self, model: Any, tokenizer: Tokenizer):
        """Raises InputError if the tokenizer has another vocabulary than the model."""
        self.config: ModelConfig = model.config
        self.tokenizer = tokenizer
        if not tokenizer.fits(self.config.vocab_size):
            raise InputError(
                "the tokenizer has another vocabulary than the model",
                expected=f"{self.config.vocab_size} pieces",
                found=f"{tokenizer.vocab_size} pieces",
                where=tokenizer.path,
                do="use the tokenizer.model of the run that trained the model",
            )

    @abstractmethod
    def _new_state(self, n_rows: int, capacity: int) -> Any:
        """The decoding state of empty rows: logits (B, V) of the next token, and a cache."""

    @abstractmethod
    def _take_rows(self, state: Any, rows_B: np.ndarray, capacity: int) -> Any:
        """A new state of the given rows, in their order and as often as named; the given state stays as it is."""

    @abstractmethod
    def _prefill(self, state: Any, tokens_BT: np.ndarray, valid_B: np.ndarray) -> Any:
        """Runs the first valid_B tokens (int32) of every row; rows with none keep their logits. Uses up the state."""

    @abstractmethod
    def _decode(
        self, state: Any, seen_BV: np.ndarray, uniforms_BN: np.ndarray, n_tokens: int, sampling: SamplingConfig
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        """Samples n_tokens tokens (at most N) of every row. Uses up the state.

        Returns:
            tokens (B, n_tokens), their log-probabilities under the model (NaN if its logits are not finite), and the
            new state.
        """

    @abstractmethod
    def _losses(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Negative log-likelihood in nats (B, T - 1) of every token but the first."""

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, logprobs: Literal[False] = False, **options: Any
    ) -> list[str]: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, logprobs: Literal[True], **options: Any
    ) -> list[Completion]: ...

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, logprobs: bool = False, **options: Any
    ) -> list[str] | list[Completion]:
        """The continuation of each prompt, without the prompt, up to the end-of-document token or a stop.

        Args:
            prompts: texts or token ids, of any lengths.
            max_new_tokens: most tokens to add to each.
            n: continuations of each prompt; they follow one another in the result.
            stop: strings and token ids that end a continuation; they are left out of its text.
            truncate: drop the beginning of a prompt that does not fit the context with its continuation; otherwise
                that is an error.
            prefix: from `prefill`: what comes before every prompt, which may then be empty.
            logprobs: return each Completion whole, with its tokens and their log-probabilities, not its text alone.
            sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed (see SamplingConfig).

        Raises:
            InputError: no prompt, an empty prompt, one that does not fit, ids outside the vocabulary, an option out of
                range, before anything is computed; or a model whose logits are not finite.
        """
        request = self._request(prompts, max_new_tokens, **options)
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
        """The continuation of one prompt in pieces of whole characters, as they are decoded; together they are what
        `generate` returns. Arguments and errors as there; errors come at the call, not at the first piece."""
        request = self._request([prompt], max_new_tokens, stop=stop, truncate=truncate, prefix=prefix, **sampling)
        return self._pieces(request)

    def check(self, prompts: Sequence[Prompt], *, max_new_tokens: int, logprobs: bool = False, **options: Any) -> None:
        """Raises the InputError that `generate` would raise, and computes nothing."""
        self._request(prompts, max_new_tokens, **options)

    def prefill(self, prompt: Prompt) -> Prefix:
        """Runs a text through the model once, for `generate` and `stream` to continue with different prompts, as if it
        stood before each of them (tokenised on its own). It can be used any number of times.

        Raises:
            InputError: the text is empty or leaves no room in the context.
        """
        tokens = self._encode(prompt, bos=True, where="the prefix")
        self._check_fits(len(tokens), 1)
        capacity = bucket(len(tokens), self.config.context_length)
        state = self._prefill_rows(self._new_state(1, capacity), [tokens[:-1]], 0, capacity)
        return Prefix(tuple(tokens), state, self)

    def score(self, texts: Sequence[Prompt]) -> list[np.ndarray]:
        """ln p of every token of each text, given all before it: float arrays, one number per token of
        `tokenizer.encode(text)`. Of token ids the first is given, not scored.

        Raises:
            InputError: no text, an empty one, one longer than the context, ids outside the vocabulary; or a model whose
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
        while order:
            width = bucket(len(ids[order[-1]]) - 1, self.config.context_length)
            n_rows = max(1, SCORE_TOKENS // width)
            group, order = order[-n_rows:], order[:-n_rows]
            tokens_BT = _padded([ids[i] for i in group], _batch_size(len(group)), width + 1)
            for i, losses in zip(group, self._losses(tokens_BT), strict=False):
                scores[i] = -losses[: len(ids[i]) - 1]
                _check_finite(scores[i], f"text {i + 1}")
        return scores

    def _request(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        n: int = 1,
        stop: str | int | Sequence[str | int] = (),
        truncate: bool = False,
        prefix: Prefix | None = None,
        **sampling: Any,
    ) -> _Request:
        self._check_list(prompts)
        config = SamplingConfig(**sampling)
        max_new_tokens, n = whole_number("max_new_tokens", max_new_tokens), whole_number("n", n)
        for name, value in (("max_new_tokens", max_new_tokens), ("n", n)):
            if value < 1:
                raise InputError(f"{name} is out of range", expected="1 or more", found=value)
        if prefix is not None and getattr(prefix, "generator", None) is not self:
            do = "give what this generator's prefill returned"
            raise InputError("not a prefix of this generator", expected="a Prefix", found=type(prefix).__name__, do=do)
        stops = tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
        if "" in stops:
            raise InputError("a stop string is empty", expected="text that can occur", found=stops)
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
            rows += [_Row(tokens, row_key(tokens, sample)) for sample in range(n)]
        stop_strings = tuple(item for item in stops if isinstance(item, str))
        ends = self.tokenizer.end_ids.union(stop_ids)
        return _Request(rows, n, max_new_tokens, stop_strings, ends, prefix, config)

    def _encode(self, prompt: Prompt, *, bos: bool, where: str, may_be_empty: bool = False) -> list[int]:
        if not isinstance(prompt, (str, Sequence, np.ndarray)):
            raise InputError("not a prompt", expected="text or a list of token ids", found=repr(prompt), where=where)
        if not len(prompt) and not may_be_empty:
            do = f"to generate from nothing, give the begin-of-document token: [{self.tokenizer.bos_id}]"
            raise InputError("empty prompt", expected="at least one token", found=repr(prompt), where=where, do=do)
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise InputError("not Unicode text", found=error, where=where) from error
            ids = self.tokenizer.encode(prompt, bos=bos)
        else:
            ids = [whole_number("a token id", token) for token in prompt]
        self._check_ids(ids, where)
        return ids

    def _check_list(self, prompts: Sequence[Prompt]) -> None:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):
            raise InputError("not a list of texts", expected="a list of at least one text", found=repr(prompts))

    def _check_ids(self, ids: list[int], where: str) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self.config.vocab_size):
            expected = f"0 to {self.config.vocab_size - 1}"
            found = f"{min(ids)} to {max(ids)}"
            raise InputError("token id outside the vocabulary", expected=expected, found=found, where=where)

    def _check_fits(self, n_tokens: int, max_new_tokens: int, where: str | None = None) -> None:
        limit = self.config.context_length
        if n_tokens + max_new_tokens > limit:
            raise InputError(
                "the text and its continuation are longer than the context",
                expected=f"at most {limit} tokens",
                found=f"{n_tokens} + {max_new_tokens} new",
                where=where,
                do=f"shorten it, ask for at most {limit - n_tokens} new tokens, or let `generate` truncate it"
                if n_tokens < limit and max_new_tokens
                else "shorten it, or let `generate` truncate it",
            )

    def _run(self, request: _Request, block: int) -> Iterator[None]:
        """Decodes `block` tokens of every unfinished row at a time. As rows finish, the batch is halved."""
        rows: list[_Row | None] = [*request.rows]
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
                if row:
                    noise_BN[i] = uniforms(request.sampling.seed, row.key, len(row.prompt) + done, BLOCK)
                    seen_BV[i, row.prompt + row.tokens] = request.sampling.repetition_penalty != 1
            tokens_BN, logprobs_BN, state = self._decode(state, seen_BV, noise_BN, count, request.sampling)
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

    def _begin(self, request: _Request, capacity: int) -> Any:
        """The state of all rows before their first new token; what samples and prompts share is computed once."""
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
        """Runs further tokens of every row, at most PREFILL_CHUNK at once."""
        longest = max(map(len, tokens))
        for start in range(0, longest, PREFILL_CHUNK):
            width = bucket(min(longest - start, PREFILL_CHUNK), capacity - cached - start)
            pieces = [row[start : min(start + PREFILL_CHUNK, start + width)] for row in tokens]
            n_rows = _batch_size(len(tokens))
            valid_B = np.array([len(piece) for piece in pieces] + [0] * (n_rows - len(pieces)), np.int32)
            state = self._prefill(state, _padded(pieces, n_rows, width), valid_B)
        return state

    def _extend(self, row: _Row, tokens: list[int], logprobs: list[float], request: _Request) -> None:
        """Adds a block to a row, up to its end."""
        n_before = len(row.tokens)
        for token, logprob in zip(tokens, logprobs, strict=True):
            _check_finite(logprob, f"new token {len(row.tokens) + 1}")
            if token in request.stop_ids:
                row.finish_reason = "stop"
                break
            row.tokens.append(token)
            row.logprobs.append(logprob)
        if request.stop_strings and _find(self._text(row.tokens), request.stop_strings) is not None:
            for n_tokens in range(n_before + 1, len(row.tokens) + 1):
                if _find(self._text(row.tokens[:n_tokens]), request.stop_strings) is not None:
                    row.tokens, row.logprobs = row.tokens[:n_tokens], row.logprobs[:n_tokens]
                    row.finish_reason = "stop"
                    break
        if row.finish_reason is None and len(row.tokens) == request.max_new_tokens:
            row.finish_reason = "length"

    def _text(self, tokens: list[int]) -> str:
        """The text of the tokens so far, without a character at its end of which bytes are missing."""
        return self.tokenizer.decode_after(tokens).rstrip("\ufffd")

    def _completion(self, row: _Row, request: _Request) -> Completion:
        assert row.finish_reason is not None  # it has run to its end
        text = shown(self._text(row.tokens), request.stop_strings, ended=True)
        return Completion(text, row.tokens, row.logprobs, row.finish_reason)

    def _pieces(self, request: _Request) -> Iterator[str]:
        row, n_sent = request.rows[0], 0
        for _ in self._run(request, STREAM_BLOCK):
            text = shown(self._text(row.tokens), request.stop_strings, ended=row.finish_reason is not None)
            if len(text) > n_sent:
                yield text[n_sent:]
                n_sent = len(text)


def shown(text: str, stop: Sequence[str], ended: bool) -> str:
    """What can be shown of a text that may go on: no stop string, and no part of one that may yet be completed."""
    if (end := _find(text, stop)) is not None:
        return text[:end]
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text if ended else text[: len(text) - held]


def _find(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=None)


def _check_finite(logprobs: Any, where: str) -> None:
    if not np.isfinite(logprobs).all():
        do = "check the checkpoint: NaN or infinite weights, or a precision too small for them"
        raise InputError("the model's logits are not finite", where=where, do=do)


def _batch_size(n_rows: int) -> int:
    """Rows of a batch with room for n_rows: 1, 2, 3, 4, 6, 8, 12, 16 ..."""
    return bucket(n_rows, 1 << 62, smallest=1) if n_rows > 2 else n_rows


def _padded(rows: Sequence[Sequence[int]], n_rows: int, width: int) -> np.ndarray:
    """The rows as int32 (n_rows, width), padded to the right and below with zeros."""
    out = np.zeros((n_rows, width), np.int32)
    for target, row in zip(out, rows, strict=False):
        target[: len(row)] = row
    return out
