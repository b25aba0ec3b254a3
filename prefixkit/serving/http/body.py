"""The body of a request: JSON, no larger and no slower than is allowed."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from prefixkit.serving.http.errors import CLIENT_GONE, ApiError

SECONDS = 30.0
"""In which a body must have arrived."""


async def read_object(request: Request, most: int) -> dict[str, Any]:
    """The JSON object in the body, of at most `most` bytes.

    Raises:
        ApiError: 415 for another content type, 413, 408, or 400 for what is no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps web pages out: a browser asks before it sends this type to another site.
        raise ApiError(415, f"Content-Type: expected application/json; found {kind or 'none'}")
    try:
        async with asyncio.timeout(SECONDS):
            data = await _read(request, most)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {SECONDS:g} seconds") from error
    except ClientDisconnect as error:
        raise ApiError(CLIENT_GONE, "the client hung up") from error
    return _parsed(data)


async def _read(request: Request, most: int) -> bytes:
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > most:
        raise _too_large(most)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > most:
            raise _too_large(most)
    return bytes(data)


def _too_large(most: int) -> ApiError:
    # How much is left of the body nobody knows, so the connection is not used again.
    return ApiError(413, f"the body has more than {most:,} bytes", headers={"Connection": "close"})


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body: expected a JSON object; found {type(body).__name__}")
    return body


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
