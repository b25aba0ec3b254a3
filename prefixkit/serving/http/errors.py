"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from prefixkit.errors import InputError
from prefixkit.serving.delivery import ClosedError, EngineError
from prefixkit.serving.request import BusyError

INVALID = "invalid_request_error"
CLIENT_GONE = 499
"""What nginx logs for a client that hung up; nobody receives it."""


class ApiError(Exception):
    """A request that gets no answer, with what its client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind, self.headers = kind, dict(headers or {})

    @property
    def document(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        # Escapes: a message may quote half a surrogate pair, which no encoding takes.
        body = json.dumps(self.document)
        return Response(body, self.status, headers=self.headers, media_type="application/json")


def told(error: Exception) -> ApiError:
    """`error` as a client is told of it; of a fault of ours no more than that there is one."""
    match error:
        case ApiError():
            return error
        case BusyError():
            wait = {"Retry-After": "1"}
            return ApiError(429, str(error), code="rate_limit_exceeded", kind="rate_limit_error", headers=wait)
        case InputError():
            return ApiError(400, str(error))
        case TimeoutError():
            return ApiError(504, "the answer took too long", code="timeout", kind="server_error")
        case ClosedError():
            return shutting_down()
        case EngineError():
            return ApiError(503, "the engine failed; the log says why", code="engine_fault", kind="server_error")
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=error.headers)
    return ApiError(500, "internal error", kind="server_error")


def wrong(param: str, error: InputError) -> ApiError:
    """What a client is told whose parameter `param` is at fault, as `error` says."""
    line = InputError(param, expected=error.expected, found=error.found, next_step=error.next_step)
    return ApiError(400, str(line), param=param)


def shutting_down() -> ApiError:
    """What a client is told whose request comes, or is still being answered, when the server ends."""
    headers = {"Retry-After": "1", "Connection": "close"}
    return ApiError(503, "the server is shutting down", kind="server_error", headers=headers)


async def handle(request: Request, error: Exception) -> Response:
    """The response to a request that raised `error`."""
    return told(error).response()


HANDLED = dict.fromkeys((ApiError, InputError, EngineError, TimeoutError, HTTPException, Exception), handle)
