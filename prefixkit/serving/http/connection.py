"""A connection to the server, which holds it no longer, and no more of them, than there is a use for."""

from __future__ import annotations

import asyncio
import logging
import sys

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 30.0
"""In which the whole head of a request must have arrived: from the beginning on, or from the answer before."""

_MOST = 1024
_log = logging.getLogger(__name__)


def most_connections() -> int:
    """At most half the process's file descriptors: without a free one, nothing can be opened or accepted any more."""
    if sys.platform == "win32":
        return _MOST
    import resource

    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if descriptors == resource.RLIM_INFINITY else min(_MOST, descriptors // 2)


class Connection(H11Protocol):
    """HTTP/1.1 with a deadline for the head of each request.

    uvicorn's own, `timeout_keep_alive`, begins with an answer and ends with the next byte: who sends nothing, or half a
    head, or slowly a body that nobody waits for, would stay for ever. The deadline of a body is with those who read it.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            _log.warning("a connection is refused: %d are open", len(self.connections) - 1)
            transport.abort()
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close what is idle, what sends a request that is not whole, and what does not read its answer."""
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body:
            self.transport.close()
        if self.flow.write_paused:
            self.transport.abort()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()

    def on_response_complete(self) -> None:
        self._expect()
        super().on_response_complete()

    def _expect(self) -> None:
        self._rest()
        self._deadline = self.loop.call_later(SECONDS, self.transport.close)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
