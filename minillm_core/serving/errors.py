"""Errors in the form of OpenAI's API."""

import difflib
import json
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minillm_core.decoding.scheduler import ExpiredError, QueueFullError
from minillm_core.errors import InputError
from minillm_core.serving.schemas import ChatRequest, CompletionRequest


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        """
        Args:
            param: the field of the request that is wrong.
            code: a fixed name of the error, for programs.
        """
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return AsciiResponse(self.content, status_code=self.status, headers=self.headers)


class AsciiResponse(JSONResponse):
    """JSON with escapes: an error may quote text that is not Unicode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def api_error(error: Exception, fields: frozenset[str] = frozenset()) -> ApiError:
    """What a client is told about an error.

    Args:
        fields: names of the request's fields; an InputError that begins with one of them is about it.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        code, headers = "queue_full", {"Retry-After": "1"}
        if "shutting down" in str(error):
            return ApiError(503, str(error), code="shutting_down", headers=headers)
        return ApiError(429, f"the server is busy: {error}", code=code, headers=headers)
    if isinstance(error, ExpiredError):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, InputError):
        first = "prompt" if "where: prompt " in str(error) else str(error).partition(" ")[0]
        if "longer than the context" in str(error):
            return ApiError(400, str(error), param="prompt", code="context_length_exceeded")
        if "logits are not finite" in str(error):
            return ApiError(500, str(error), code="not_finite")
        return ApiError(400, str(error), param=first if first in fields else None)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    return api_error(error).response()


MOST_PROBLEMS = 20
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields})
FORMS = {
    "prompt": "a text, token ids, or a list of texts or of lists of token ids",
    "stop": "a text or a list of texts, none of them empty",
    "content": "a text, or a list of parts of type text",
}
"""What fields of several forms can be. (Pydantic would list what is wrong for each of the forms.)"""


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not JSON, or has wrong fields. The first MOST_PROBLEMS are told."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if problems[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problems[0]['ctx']['error']}", code="invalid_json").response()
    lines = dict.fromkeys(_problem(problem["loc"][1:], problem) for problem in problems[:MOST_PROBLEMS])
    param = next((str(problem["loc"][1]) for problem in problems if len(problem["loc"]) > 1), None)
    return ApiError(400, "\n".join(lines), param=param).response()


def _problem(place: tuple[int | str, ...], problem: Any) -> str:
    if not place:
        return "the body is not a JSON object, sent with `Content-Type: application/json`"
    for i, part in enumerate(place):
        if part in FORMS:
            return f"{'.'.join(map(str, place[: i + 1]))}: expected {FORMS[str(part)]}"
    says = problem["msg"]
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(place[-1]), FIELDS, n=1)
        says = "this field is not supported" + (f"; did you mean {close[0]}?" if close else "")
    elif problem["type"] == "too_long" and not problem["ctx"]["max_length"]:
        says = "only an empty value is supported; leave this field out"
    elif problem["type"] in ("literal_error", "none_required"):
        says = f"only {problem.get('ctx', {}).get('expected', 'null')} is supported; leave this field out"
    return f"{'.'.join(map(str, place))}: {says}"


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """An unknown path or method, or a body that cannot be read."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        return ApiError(400, "the body cannot be read as JSON in UTF-8", code="invalid_json").response()
    message = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not accept {request.method}"}
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message.get(error.status_code, str(error.detail)), headers=headers).response()
