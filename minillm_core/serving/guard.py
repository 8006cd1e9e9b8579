"""What is checked before a request reaches an endpoint: its host, the page that sends it, its key, its size."""

import base64
import binascii
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minillm_core.serving.errors import ApiError
from minillm_core.serving.metrics import Metrics

MOST_BYTES = 4 << 20
"""Of the body of a request."""
OPEN = ("/health",)
"""Paths that need no key."""


class Guard:
    """An ASGI application around another one.

    Args:
        api_key: what a client must send, as `Authorization: Bearer KEY` or, from a browser, as the password of HTTP's
            basic authentication; None: nothing.
        hosts: names by which the server may be called; None: any. A page of a different site can make its own name
            point to this machine, but its requests carry that name (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, hosts: frozenset[str] | None, metrics: Metrics):
        self._app, self._key, self._hosts, self._metrics = app, api_key, hosts, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        n_bytes, status, is_too_large = 0, 0, False

        async def limited() -> Message:
            nonlocal n_bytes, is_too_large
            message = await receive()
            n_bytes += len(message.get("body", b""))
            is_too_large = is_too_large or n_bytes > MOST_BYTES
            return {"type": "http.disconnect"} if is_too_large else message

        async def counted(message: Message) -> None:
            nonlocal status
            if is_too_large and not status:
                return  # the application's answer to a body that broke off
            if message["type"] == "http.response.start":
                status = message["status"]
                path = getattr(scope.get("route"), "path", "unknown")
                self._metrics.responses.labels(path, str(status)).inc()
            await send(message)

        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            await self._app(scope, limited, counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        if is_too_large and not status:
            is_too_large = False
            message = f"the body has more than {MOST_BYTES:,} bytes"
            await ApiError(413, message, code="too_large", headers={"Connection": "close"}).response()(
                scope, receive, counted
            )

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if self._hosts is not None and name.lower() not in self._hosts:
            expected = " or ".join(sorted(self._hosts))
            raise ApiError(421, f"this server is called {expected}, not {name!r}", code="wrong_host")
        if _is_of_another_site(method, headers):
            raise ApiError(403, "a page of a different site must not use this server", code="cross_site")
        if self._key is None or path in OPEN:
            return
        if not hmac.compare_digest(
            _key(headers.get("authorization", "")).encode("utf-8", "replace"), self._key.encode()
        ):
            ask = {"WWW-Authenticate": 'Basic realm="minillm: any name, and the API key as the password"'}
            message = "a valid API key is needed, as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers=ask)


def _is_of_another_site(method: str, headers: Headers) -> bool:
    """Whether a browser sends this for a page that is not the server's own. A page cannot read the answer, but the
    server would work for it, and the browser adds the key that its user has typed in. A link may lead here."""
    if "sec-fetch-site" not in headers:  # no browser, or a host that browsers do not trust: HTTP without TLS
        origin = headers.get("origin")
        return origin is not None and origin.rpartition("/")[2] != headers.get("host")
    is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    return headers["sec-fetch-site"] not in ("same-origin", "none") and not is_link


def _key(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
