"""One request and its answer, as they pass."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import Message, Receive, Send


class Exchange:
    """Notes what passes between a client and the application.

    Attributes:
        status: of the answer; None before it.
        whole: whether all of the request has been read.
    """

    def __init__(self, receive: Receive, send: Send, arrived: Callable[[], None]) -> None:
        """Call `arrived` when the request is whole."""
        self._receive, self._send, self._arrived = receive, send, arrived
        self.status: int | None = None
        self.whole = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False) and not self.whole:
            self.whole = True
            self._arrived()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
