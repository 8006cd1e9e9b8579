"""A server for the tests of the playground: its page and "break it", with scripted texts in place of models.

The prompt says what happens: `differ`, `slow`, `breaks off`, `fails`, `strange`.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Body, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from minillm_core.serving.break_it import Breaker
from minillm_core.serving.break_it_routes import break_it_router
from minillm_core.serving.page import page_router

WORDS = [" we", " hold", " these", " truths", " to", " be", " self-evident", ",\n\n", "that", " all", " men", " are"]
STRANGE = ["<img src=x onerror=alert(1)>", "", "", "é", "   ", "\n", "한"]
DEFAULTS = {"max_tokens": 40, "temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.0}


def scripted_app(frameworks: list[str], breaker: Breaker, *, loading: int = 0) -> FastAPI:
    """The server. Its first `loading` answers about the models say that they are being loaded."""
    app = FastAPI()
    app.include_router(page_router())
    app.include_router(break_it_router(breaker))
    app.state.requests, app.state.open = [], 0
    models = [{"id": f"quickstart-{name}", "framework": name, "device": "cpu"} for name in frameworks]
    remaining = iter(range(loading))

    @app.get("/playground/models", response_model=None)
    def served() -> Any:
        if next(remaining, None) is not None:
            return JSONResponse({"error": {"message": "The model is still loading."}}, status_code=503)
        defaults = DEFAULTS | {"repetition_penalty": 1.0, "seed": 0}
        return {"models": models, "checkpoint": "runs/quickstart", "context_length": 256, "defaults": defaults}

    @app.post("/playground/generate", response_model=None)
    def generate(body: dict[str, Any] = Body()) -> Any:  # noqa: B008 (how FastAPI is written)
        app.state.requests.append(body)
        if body["temperature"] < 0:
            message = "temperature is out of range\n  expected: 0 or more\n  found: -1"
            error = {"message": message, "type": "invalid_request_error", "param": "temperature", "code": None}
            return JSONResponse({"error": error}, status_code=400)
        return StreamingResponse(counted(events(body, models)), media_type="text/event-stream")

    async def counted(stream: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        app.state.open += 1
        try:
            async for event in stream:
                yield f"data: {json.dumps(event)}\n\n"
        finally:
            app.state.open -= 1

    return app


async def events(body: dict[str, Any], models: list[dict[str, str]]) -> AsyncIterator[dict[str, Any]]:
    """The same words from every model; with `differ`, other words from the second one after ten tokens."""
    prompt = body["prompt"]
    for index in range(body["max_tokens"]):
        for number, model in enumerate(models):
            other = "differ" in prompt and number == 1 and index >= 10
            yield token(model["id"], index, STRANGE if "strange" in prompt else WORDS, other)
        if len(models) == 2 and not ("differ" in prompt and index >= 10):
            yield {"type": "difference", "tokens": index + 1, "logits": 3.1e-06}
        if "breaks off" in prompt and index == 4:
            return
        if "fails" in prompt and index == 4:
            yield {"type": "error", "message": "out of memory"}
            return
        await asyncio.sleep(0.1 if "slow" in prompt else 0.002)
    for model in models:
        yield {"type": "done", "model": model["id"], "finish_reason": "length"}


def token(model: str, index: int, texts: list[str], other: bool) -> dict[str, Any]:
    text = " different" if other else texts[index % len(texts)]
    logprob = -((index % 7) ** 2) / 10 - 0.01
    rest = math.log((1 - math.exp(logprob)) / 20)
    alternatives = [{"id": 500 + i, "text": f" word{i}", "logprob": rest - i / 4} for i in range(9)]
    chosen = {"id": 7 if other else 100 + index % len(texts), "text": text, "logprob": logprob}
    alternatives = sorted([chosen, *alternatives], key=lambda a: -a["logprob"])
    values = {"type": "token", "model": model, "index": index, "tokens_per_second": 55.2 + index / 10}
    return values | chosen | {"alternatives": alternatives}
