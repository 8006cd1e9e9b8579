"""/v1/completions: the request that a body means, and the answer in OpenAI's form."""

import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from minillm_core.decoding.logprobs import Alternatives
from minillm_core.decoding.requests import Request
from minillm_core.decoding.scheduler import Details, Update
from minillm_core.serving.errors import ApiError
from minillm_core.serving.models import Answers, ServedModel
from minillm_core.serving.schemas import MOST_CHOICES, MOST_LOGPROBS, CompletionRequest, SamplingFields
from minillm_core.serving.token_texts import TextDecoder

JSON = dict[str, Any]


def sampling_of(body: SamplingFields) -> JSON:
    """The options of `generate`, with OpenAI's defaults."""
    seed = secrets.randbits(63) if body.seed is None else body.seed % (1 << 64)
    return {
        "n": body.n or 1,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_k": max(body.top_k or 0, 0),
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "min_p": body.min_p or 0.0,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
        "seed": seed,
    }


def stops_of(body: SamplingFields) -> list[str | int]:
    texts = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return [*texts, *(body.stop_token_ids or [])]


def check_stream_options(body: SamplingFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream", param="stream_options")


class Head:
    """What all parts of an answer have in common."""

    def __init__(self, prefix: str, kind: str, model: ServedModel):
        self._id, self._created, self._model = f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model.id
        self._kind = kind

    def answer(self, choices: list[JSON], *, kind: str | None = None, **fields: Any) -> JSON:
        head = {"id": self._id, "object": kind or self._kind, "created": self._created, "model": self._model}
        return head | {"choices": choices} | fields


class Usage:
    """Counts the tokens of a request: those of the prompts, and those that were generated, end tokens included."""

    def __init__(self, requests: Sequence[Request]):
        self._prompt = sum(len(request.rows[0].prompt) for request in requests)
        self.generated = 0

    def json(self) -> JSON:
        total = self._prompt + self.generated
        return {"prompt_tokens": self._prompt, "completion_tokens": self.generated, "total_tokens": total}


def read_completion(model: ServedModel, body: CompletionRequest) -> tuple[list[Request], Details]:
    """The checked requests of a body, one per prompt.

    Raises:
        ApiError, InputError: they cannot be answered.
    """
    check_stream_options(body)
    prompts: list[Any] = [body.prompt] if isinstance(body.prompt, str) or _is_ids(body.prompt) else [*body.prompt]
    sampling, max_tokens = sampling_of(body), 16 if body.max_tokens is None else body.max_tokens
    if not prompts:
        raise ApiError(400, "prompt: there is none", param="prompt")
    if len(prompts) * sampling["n"] > MOST_CHOICES:
        found = f"{len(prompts)} prompts with {sampling['n']} continuations each"
        raise ApiError(400, f"prompt: at most {MOST_CHOICES} continuations per request, found {found}", param="prompt")
    if len(prompts) > model.scheduler.max_queue:
        raise ApiError(400, f"prompt: at most {model.scheduler.max_queue}, the server's queue", param="prompt")
    if max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens: 0 only with echo", param="max_tokens")
    scores_prompt = bool(body.echo) and (body.logprobs is not None or max_tokens == 0)
    details = Details(body.logprobs or None, prompt=scores_prompt)
    options = {"stop": stops_of(body), "least_new_tokens": 0, **sampling}
    checked = [model.generator.request([prompt], max_tokens, **options) for prompt in prompts]
    if body.logprobs is not None:
        n_tokens = sum(request.n * (max_tokens + bool(body.echo) * len(request.rows[0].prompt)) for request in checked)
        if n_tokens * (1 + body.logprobs) > MOST_LOGPROBS:
            message = f"logprobs: the answer could have more than {MOST_LOGPROBS:,} log-probabilities"
            raise ApiError(400, f"{message}; ask for fewer prompts, tokens or alternatives at a time", param="logprobs")
    return checked, details


def _is_ids(prompt: Sequence[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


class _Choice:
    """One continuation, as far as it has come."""

    def __init__(self, model: ServedModel, index: int, wants_logprobs: bool):
        self.index, self.text = index, ""
        self.finish_reason: str | None = None
        self._model, self._wants_logprobs = model, wants_logprobs
        self._decoder = TextDecoder(model.tokenizer)
        self.logprobs: JSON = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(
        self, text: str, tokens: list[int], logprobs: Sequence[float | None], alternatives: list[Alternatives]
    ) -> None:
        self.text += text
        texts = self._model.texts
        if not self._wants_logprobs:
            return
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            best: JSON = {}
            for other, value in reversed(alternatives[i]) if alternatives else []:  # of equal texts, the most likely
                best[texts[other]] = (
                    logprob if other == token else value
                )  # the device's and the host's last bits differ
            if logprob is not None and best:
                best.setdefault(texts[token], logprob)
            self.logprobs["tokens"].append(texts[token])
            self.logprobs["token_logprobs"].append(logprob)
            self.logprobs["top_logprobs"].append(best or None)
            self._decoder.add(token)
            self.logprobs["text_offset"].append(self._decoder.start)

    def json(self) -> JSON:
        logprobs = self.logprobs if self._wants_logprobs else None
        return {"index": self.index, "text": self.text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def take(self) -> JSON:
        """What has been added since the last call."""
        part = self.json()
        self.text, self.logprobs = "", {name: [] for name in self.logprobs}
        return part


def _prompt_text(model: ServedModel, body: CompletionRequest, prompt: int, ids: list[int]) -> str:
    given = body.prompt if isinstance(body.prompt, str) or _is_ids(body.prompt) else body.prompt[prompt]
    return given if isinstance(given, str) else model.tokenizer.decode(ids)


async def parts_of(
    model: ServedModel, body: CompletionRequest, requests: list[Request], answers: Answers, usage: Usage
) -> AsyncIterator[_Choice]:
    """The choices of the answer, each as often as something was added to it."""
    n, wants_logprobs = requests[0].n, body.logprobs is not None
    choices = [_Choice(model, i, wants_logprobs) for i in range(len(requests) * n)]
    for choice in choices if body.echo else []:
        request = requests[choice.index // n]
        choice.text = _prompt_text(model, body, choice.index // n, request.rows[0].prompt)
    async for prompt, event in answers:
        if isinstance(event, Update):
            choice = choices[prompt * n + event.sample]
            usage.generated += len(event.tokens)
            choice.add(event.text, event.tokens, event.logprobs, event.alternatives)
            choice.finish_reason = event.finish_reason
            yield choice
            continue
        request = requests[prompt]
        for choice in choices[prompt * n : (prompt + 1) * n]:
            choice.add("", request.rows[0].prompt, [None, *event.logprobs], [[], *event.alternatives])
            if not request.max_new_tokens:
                choice.finish_reason = "length"
            yield choice
