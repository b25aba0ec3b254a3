"""One request and its answer, as they pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from starlette.types import Message, Receive, Scope, Send

SECONDS = 30.0
"""For the rest of a request that is answered already."""

_MOST = 64 * 2**20
"""Bytes of it."""


class Exchange:
    """Notes what passes between a client and the application.

    Attributes:
        status: of the answer; None before it.
        whole: whether all of the request has been read.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, arrived: Callable[[], None]) -> None:
        """Call `arrived` when the request is whole."""
        self._receive, self._send, self._arrived = receive, send, arrived
        self._sends = _has_body(scope) and not _waits(scope)
        self.status: int | None = None
        self.whole = False

    async def receive(self) -> Message:
        # Whoever waits is told to go on, unless there is an answer.
        self._sends = self._sends or self.status is None
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False) and not self.whole:
            self.whole = True
            self._arrived()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self._sends and not self.whole and not message.get("more_body", False):
            # Closed while there is something to read, the connection would be reset, and the answer lost with it.
            await self._send({**message, "more_body": True})
            await self._discard()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _discard(self) -> None:
        """Read the rest of the request, within limits (RFC 9112, section 9.6)."""
        left = _MOST
        with suppress(TimeoutError):
            async with asyncio.timeout(SECONDS):
                while left > 0 and not self.whole:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        return
                    left -= len(message.get("body", b""))


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def _waits(scope: Scope) -> bool:
    """Whether the client sends its body only when it is told to (RFC 9110, section 10.1.1)."""
    return any(name == b"expect" for name, _ in scope["headers"])
