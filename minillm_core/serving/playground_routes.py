"""The endpoints of the playground's first tab: one prompt, continued by all models of the server side by side."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from minillm_core.decoding.sampling import SamplingConfig
from minillm_core.decoding.scheduler import Details, Update
from minillm_core.serving.errors import ApiError, api_error
from minillm_core.serving.models import Answers, Models, ServedModel
from minillm_core.serving.openai_routes import EventStream, event
from minillm_core.serving.schemas import PlaygroundRequest
from minillm_core.serving.token_texts import TextDecoder

JSON = dict[str, Any]
N_ALTERNATIVES = 10
MAX_TOKENS = 100
"""The page's default."""


def playground_router(models: Models, checkpoint: Path) -> APIRouter:
    router = APIRouter(prefix="/playground")

    @router.get("/models")
    def served() -> JSON:
        found = models.all()
        return {
            "models": [{"id": model.id, "framework": model.framework, "device": model.device} for model in found],
            "checkpoint": str(checkpoint),
            "context_length": found[0].config.context_length,
            "defaults": {"max_tokens": MAX_TOKENS} | asdict(SamplingConfig()),
        }

    @router.post("/generate", response_model=None)
    async def generate(body: PlaygroundRequest) -> Response:
        found = models.all()
        details = Details(N_ALTERNATIVES, logits=len(found) > 1)
        options = body.model_dump(exclude={"prompt", "max_tokens"})
        started: list[Answers] = []
        try:
            for model in found:
                request = await run_in_threadpool(model.generator.request, [body.prompt], body.max_tokens, **options)
                started.append(Answers(model, [request], details))
        except Exception as error:
            for answers in started:
                answers.cancel()
            refused = api_error(error, frozenset(PlaygroundRequest.model_fields))
            if refused.content["error"]["code"] == "context_length_exceeded":
                refused = ApiError(400, str(error), param="max_tokens", code="context_length_exceeded")
            raise refused from error
        sides = [_Side(model, answers) for model, answers in zip(found, started, strict=True)]
        return EventStream(_events(sides), started)

    return router


class _Side:
    """One model's continuation."""

    def __init__(self, model: ServedModel, answers: Answers):
        self.model, self.answers = model, answers
        self.tokens: list[int] = []
        self.is_finished = False
        self.logits: dict[int, np.ndarray] = {}
        """Index of a token -> the logits that it was sampled from, until they are compared."""
        self._decoder, self._started = TextDecoder(model.tokenizer), time.monotonic()

    def events(self, update: Update) -> list[JSON]:
        """What the page is told about new tokens."""
        found: list[JSON] = []
        is_end = update.finish_reason == "stop" and bool({*update.tokens[-1:]} & self.model.tokenizer.end_ids)
        shown = update.tokens[:-1] if is_end else update.tokens
        for i, token in enumerate(shown):
            index = len(self.tokens)
            self.tokens.append(token)
            if update.logits:
                self.logits[index] = update.logits[i]
            best = [
                {"id": id, "text": self.model.texts[id], "logprob": logprob} for id, logprob in update.alternatives[i]
            ]
            rate = len(self.tokens) / (time.monotonic() - self._started)
            found.append(
                {"type": "token", "model": self.model.id, "index": index, "id": token, "text": self._decoder.add(token)}
                | {"logprob": update.logprobs[i], "alternatives": best, "tokens_per_second": rate}
            )
        if update.finish_reason:
            self.is_finished = True
            found.append({"type": "done", "model": self.model.id, "finish_reason": update.finish_reason})
        return found


class _Difference:
    """The largest difference of the logits of two sides, as long as their tokens are the same."""

    def __init__(self, sides: list[_Side]):
        self._sides, self._n_compared, self._largest = sides, 0, 0.0
        self._is_over = False

    def events(self) -> list[JSON]:
        before = self._n_compared
        ours, theirs = self._sides
        while self._n_compared in ours.logits and self._n_compared in theirs.logits:
            i = self._n_compared
            self._is_over = ours.tokens[:i] != theirs.tokens[:i]
            if self._is_over:
                break
            difference = float(np.abs(ours.logits.pop(i) - theirs.logits.pop(i)).max())
            self._largest, self._n_compared = max(self._largest, difference), i + 1
        self._is_over |= any(side.is_finished and self._n_compared not in side.logits for side in self._sides)
        for side in self._sides if self._is_over else []:
            side.logits.clear()  # of a large vocabulary, they take hundreds of megabytes
        if self._n_compared == before:
            return []
        return [{"type": "difference", "tokens": self._n_compared, "logits": self._largest}]


async def _events(sides: list[_Side]) -> AsyncIterator[str]:
    """Server-sent events of all sides, as they come."""
    queue: asyncio.Queue[JSON | None] = asyncio.Queue()  # no logits: a slow client would keep all of them in memory
    difference = _Difference(sides) if len(sides) == 2 else None

    async def follow(side: _Side) -> None:
        try:
            async for _, update in side.answers:
                assert isinstance(update, Update)  # prompts are not scored
                for item in [*side.events(update), *(difference.events() if difference else [])]:
                    queue.put_nowait(item)
        except Exception as error:
            queue.put_nowait({"type": "error", "message": api_error(error).content["error"]["message"]})
        queue.put_nowait(None)

    tasks = [asyncio.create_task(follow(side)) for side in sides]
    n_open = len(sides)
    try:
        while n_open:
            item = await queue.get()
            if item is None:
                n_open -= 1
                continue
            yield event(item)
            if item["type"] == "error":
                return
    finally:
        for task in tasks:
            task.cancel()
