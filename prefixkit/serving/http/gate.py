"""What every request passes: the key, the closing of the server, and the count of what became of it."""

from __future__ import annotations

import hmac
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from prefixkit.serving.http.errors import CLIENT_GONE, ApiError, shutting_down
from prefixkit.serving.http.exchange import Exchange
from prefixkit.serving.http.loopback import is_loopback
from prefixkit.serving.http.service import Service

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
_MODEL = "/v1/models/"
_PORT = re.compile(r":\d+$")


class Gate:
    """ASGI middleware: refuses what may not pass, and counts requests by route and status."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._begin)
        try:
            refusal = self._refusal(scope)
            await (self._app if refusal is None else refusal.response())(scope, exchange.receive, exchange.send)
        except Exception:
            # Starlette answers it further out.
            exchange.status = exchange.status or 500
            raise
        finally:
            self._service.active -= exchange.whole
            status = exchange.status or CLIENT_GONE
            self._service.metrics.requests.labels(_route(scope["path"]), str(status)).inc()

    def _begin(self) -> None:
        self._service.active += 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] == "/health":
            return None
        if self._service.local and not is_loopback(_PORT.sub("", _header(scope, b"host").decode("latin-1"))):
            return ApiError(403, "Host: expected localhost; serve with an API key to be called by other names")
        if self._service.api_key is not None and not _shows(scope, self._service.api_key):
            message = "expected the API key, as `Authorization: Bearer KEY`"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._service.draining and scope["path"] != "/metrics":
            return shutting_down()
        return None


def _shows(scope: Scope, key: str) -> bool:
    scheme, _, given = _header(scope, b"authorization").partition(b" ")
    # Of equal duration for every key, so that none can be guessed letter by letter.
    return hmac.compare_digest(given.strip(), key.encode()) and scheme.lower() == b"bearer"


def _header(scope: Scope, wanted: bytes) -> bytes:
    found: bytes = next((value for name, value in scope["headers"] if name == wanted), b"")
    return found


def _route(path: str) -> str:
    """Few labels, whatever is asked for."""
    if path.startswith(_MODEL):
        return f"{_MODEL}{{name}}"
    return path if path in ROUTES else "other"
