"""The endpoints of "break it": the faults that the model can have, and one of them planted."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minillm_core.errors import InputError, missing_package
from minillm_core.serving.break_it import Breaker, installed

if TYPE_CHECKING:
    from fastapi import APIRouter


@dataclass
class BreakRequest:
    """The body of a request to break the model."""

    fault: str
    side: str
    text: str | None = None
    form: int = 0


def break_it_router(breaker: Breaker) -> "APIRouter":
    """GET /playground/faults and POST /playground/break.

    Both are computed in a thread of their own, so that the server goes on meanwhile.

    Raises:
        InputError: fastapi is not installed.
    """
    try:
        from fastapi import APIRouter
        from fastapi.responses import JSONResponse
    except ModuleNotFoundError as error:
        raise missing_package(error, "serve") from error
    router = APIRouter(prefix="/playground")

    def refused(error: InputError) -> JSONResponse:
        content = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": content}, status_code=400)

    @router.get("/faults", response_model=None)
    def faults() -> dict[str, Any] | JSONResponse:
        try:
            found = breaker.faults()
        except InputError as error:
            return refused(error)
        return {
            "faults": [
                {"name": name, "says": forms[0].says, "forms": [form.says for form in forms]}
                for name, forms in found.items()
            ],
            "sides": installed(),
        }

    @router.post("/break", response_model=None)
    def break_it(request: BreakRequest) -> dict[str, Any] | JSONResponse:
        try:
            return breaker.break_it(request.fault, request.side, request.text or None, request.form)
        except InputError as error:
            return refused(error)

    return router
