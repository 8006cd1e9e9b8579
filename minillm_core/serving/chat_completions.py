"""/v1/chat/completions: the request that a conversation means, and the answer in OpenAI's form."""

from collections.abc import AsyncIterator

from minillm_core.decoding.requests import Request
from minillm_core.decoding.scheduler import Details, Update
from minillm_core.serving.completions import JSON, Usage, check_stream_options, sampling_of, stops_of
from minillm_core.serving.errors import ApiError
from minillm_core.serving.models import Answers, ServedModel
from minillm_core.serving.schemas import ChatMessage, ChatRequest


def read_chat(model: ServedModel, body: ChatRequest) -> tuple[list[Request], Details]:
    """The checked request of a conversation, in the model's chat format.

    Raises:
        ApiError, InputError: it cannot be answered.
    """
    check_stream_options(body)
    if model.chat is None:
        raise ApiError(400, model.why_no_chat, param="messages", code="no_chat_template")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens: give it or max_completion_tokens, not both", param="max_tokens")
    ids = model.chat.prompt([{"role": message.role, "content": _text(message)} for message in body.messages])
    room = model.config.context_length - len(ids)
    max_tokens = body.max_completion_tokens or body.max_tokens or max(room, 1)
    stop = [*stops_of(body), *sorted(model.chat.stop_ids)]
    details = Details(body.top_logprobs or None)
    return [model.generator.request([ids], max_tokens, stop=stop, **sampling_of(body))], details


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


class Reply:
    """One reply, as far as it has come."""

    def __init__(self, model: ServedModel, index: int, wants_logprobs: bool):
        self.index, self.text = index, ""
        self.finish_reason: str | None = None
        self._model, self._wants_logprobs = model, wants_logprobs
        self._logprobs: list[JSON] = []

    def add(self, update: Update) -> None:
        self.text += update.text
        self.finish_reason = update.finish_reason
        if self._wants_logprobs:
            for i, (token, logprob) in enumerate(zip(update.tokens, update.logprobs, strict=True)):
                best = update.alternatives[i] if update.alternatives else []
                top = [self._token(other, logprob if other == token else value) for other, value in best]
                self._logprobs.append(self._token(token, logprob) | {"top_logprobs": top})

    def _token(self, token: int, logprob: float) -> JSON:
        text = self._model.texts[token]
        return {"token": text, "logprob": logprob, "bytes": self._model.texts.bytes_of(token)}

    def _rest(self) -> JSON:
        logprobs = {"content": self._logprobs, "refusal": None} if self._wants_logprobs else None
        return {"logprobs": logprobs, "finish_reason": self.finish_reason}

    def json(self) -> JSON:
        message = {"role": "assistant", "content": self.text, "refusal": None}
        return {"index": self.index, "message": message} | self._rest()

    def first(self) -> JSON:
        """The beginning of a stream."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def take(self) -> JSON:
        """What has been added since the last call."""
        part = {"index": self.index, "delta": {"content": self.text} if self.text else {}} | self._rest()
        self.text, self._logprobs = "", []
        return part


async def replies_of(
    model: ServedModel, body: ChatRequest, request: Request, answers: Answers, usage: Usage
) -> AsyncIterator[Reply]:
    """The replies, each as often as something was added to it."""
    replies = [Reply(model, i, bool(body.logprobs)) for i in range(request.n)]
    async for _, event in answers:
        assert isinstance(event, Update)  # prompts are not scored
        usage.generated += len(event.tokens)
        replies[event.sample].add(event)
        yield replies[event.sample]
