"""The endpoints of OpenAI's API."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from minillm_core.decoding import requests
from minillm_core.decoding.scheduler import Details
from minillm_core.serving.chat_completions import Reply, read_chat, replies_of
from minillm_core.serving.completions import JSON, Head, Usage, parts_of, read_completion
from minillm_core.serving.errors import api_error
from minillm_core.serving.models import Answers, Models, ServedModel
from minillm_core.serving.schemas import ChatRequest, CompletionRequest, SamplingFields

T = TypeVar("T", bound=SamplingFields)
R = TypeVar("R")


class Part(Protocol):
    """A choice of an answer."""

    index: int

    def json(self) -> JSON: ...
    def take(self) -> JSON: ...


def openai_router(models: Models) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    def list_models() -> JSON:
        return {"object": "list", "data": [_described(model) for model in models.all()]}

    @router.get("/models/{id}")
    def describe_model(id: str) -> JSON:
        return _described(models[id])

    @router.post("/completions", response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        model, found, details = await _read(models, body, read_completion)
        usage, head, answers = Usage(found), Head("cmpl", "text_completion", model), Answers(model, found, details)
        parts = parts_of(model, body, found, answers, usage)
        return await _respond(http, body, head, head, parts, answers, usage)

    @router.post("/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        model, found, details = await _read(models, body, read_chat)
        usage, head, answers = Usage(found), Head("chatcmpl", "chat.completion", model), Answers(model, found, details)
        chunks = Head("chatcmpl", "chat.completion.chunk", model)
        parts = replies_of(model, body, found[0], answers, usage)
        first = [Reply(model, i, wants_logprobs=False).first() for i in range(found[0].n)]
        return await _respond(http, body, head, chunks, parts, answers, usage, first)

    return router


def _described(model: ServedModel) -> JSON:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "minillm",
        "max_model_len": model.config.context_length,  # as in vLLM
    }


async def _read(
    models: Models, body: T, read: Callable[[ServedModel, T], tuple[list[requests.Request], Details]]
) -> tuple[ServedModel, list[requests.Request], Details]:
    """The model and the checked requests of a body. A long text or a template takes time, so this runs in a thread."""
    model = models[body.model]
    try:
        return model, *await run_in_threadpool(read, model, body)
    except Exception as error:
        raise api_error(error, frozenset(type(body).model_fields)) from error


async def _respond(
    http: Request,
    body: SamplingFields,
    head: Head,
    chunk_head: Head,
    parts: AsyncIterator[Part],
    answers: Answers,
    usage: Usage,
    first: Sequence[JSON] = (),
) -> Response:
    """The answer as a whole, or as a stream of its parts."""
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_events(chunk_head, parts, usage if with_usage else None, first), [answers])

    async def whole() -> Response:
        choices = {part.index: part async for part in parts}
        return JSONResponse(head.answer([choices[i].json() for i in sorted(choices)], usage=usage.json()))

    try:
        return await unless_gone(http, whole)
    except Exception as error:
        raise api_error(error) from error
    finally:
        answers.cancel()


class EventStream(StreamingResponse):
    """Server-sent events. However they end, even before the first one, the requests that they come from stop."""

    def __init__(self, events: AsyncIterator[str], sources: Sequence[Answers]):
        super().__init__(events, media_type="text/event-stream")
        self._sources = sources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answers in self._sources:
                answers.cancel()


async def _events(
    head: Head, parts: AsyncIterator[Part], usage: Usage | None, first: Sequence[JSON]
) -> AsyncIterator[str]:
    """Server-sent events. An error after the beginning is the last one."""
    try:
        for choice in first:
            yield event(head.answer([choice]))
        async for part in parts:
            taken = part.take()
            if taken.get("text") or taken.get("delta") or taken["logprobs"] or taken["finish_reason"]:
                yield event(head.answer([taken]))
        if usage is not None:
            yield event(head.answer([], usage=usage.json()))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(api_error(error).content)


def event(content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def unless_gone(http: Request, work: Callable[[], Awaitable[R]]) -> R | Response:
    """What `work` returns, or an empty response if the client leaves first; then the work is cancelled."""
    working, leaving = asyncio.ensure_future(work()), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(http: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
