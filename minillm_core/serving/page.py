"""Serves the playground's page: the files of the folder `playground`, and nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING

from minillm_core.errors import missing_package

if TYPE_CHECKING:
    from fastapi import APIRouter

FOLDER = Path(__file__).parent / "playground"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of the package shows its own page
}
"""The page runs only its own files, and is not shown inside another page."""


def page_router() -> "APIRouter":
    """GET / for the page, and GET /playground/NAME for each of its files.

    Raises:
        InputError: fastapi is not installed.
    """
    try:
        from fastapi import APIRouter
        from fastapi.responses import FileResponse
    except ModuleNotFoundError as error:
        raise missing_package(error, "serve") from error
    router = APIRouter(include_in_schema=False)

    def serve(path: str, file: Path) -> None:
        router.add_api_route(
            path,
            lambda: FileResponse(file, media_type=TYPES[file.suffix], headers=HEADERS),
            methods=["GET"],
            response_class=FileResponse,
        )

    for file in sorted(FOLDER.iterdir()):
        serve("/" if file.name == "index.html" else f"/playground/{file.name}", file)
    return router
