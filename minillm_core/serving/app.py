"""The application: all endpoints of the server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minillm_core.decoding.scheduler import ExpiredError, QueueFullError
from minillm_core.errors import InputError
from minillm_core.serving.break_it import Breaker
from minillm_core.serving.break_it_routes import break_it_router
from minillm_core.serving.errors import ApiError, on_api_error, on_http_error, on_invalid
from minillm_core.serving.guard import Guard
from minillm_core.serving.models import Models
from minillm_core.serving.openai_routes import openai_router
from minillm_core.serving.page import page_router
from minillm_core.serving.playground_routes import playground_router
from minillm_core.version import __version__


def create_app(
    models: Models, checkpoint: Path, *, api_key: str | None = None, hosts: frozenset[str] | None = None
) -> FastAPI:
    """The server's application. It loads the models when it starts, and ends their threads when it stops.

    Args:
        checkpoint: the one that the page names, and breaks.
        api_key, hosts: see Guard.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        models.close()

    app = FastAPI(title="Mini-LLM", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=api_key, hosts=hosts, metrics=models.metrics)
    for kind in (ApiError, InputError, QueueFullError, ExpiredError, Exception):  # those not named would be logged
        app.add_exception_handler(kind, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    for router in (openai_router(models), playground_router(models, checkpoint), break_it_router(Breaker(checkpoint))):
        app.include_router(router)
    app.include_router(page_router())

    @app.get("/health", response_model=None)
    async def health() -> JSONResponse:
        """Whether the models are loaded: 200 or 503. It waits for no thread: all of them may be busy."""
        return JSONResponse({"status": models.state}, status_code=200 if models.state == "ready" else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(models.metrics.text(), media_type="text/plain; version=0.0.4")

    return app
