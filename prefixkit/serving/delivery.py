"""From the thread that writes to the task that asked: answers as they come, in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from prefixkit.errors import PrefixkitError
from prefixkit.serving.request import Progress


class EngineError(PrefixkitError):
    """A step failed, and with it the requests that were being written; or the engine is broken, or closed."""


class ClosedError(EngineError):
    """The engine is closed: nothing is wrong with it."""

    def __init__(self) -> None:
        super().__init__("engine", found="it is closed")


Watch = Callable[[int, Progress], None]
"""Looks on at answers: the index of the request, and what was written for it."""


class Answers:
    """What the engine writes for some requests, as it comes: `(index, progress)`, until each has its completion.

    Whoever asked must call `close`, which cancels what is not finished.
    """

    def __init__(self, count: int, forget: Callable[[Answers], None], watch: Watch) -> None:
        """Call `watch` with each as it arrives, however late it is asked for."""
        self._left, self._forget, self._watch = count, forget, watch
        self._inbox: asyncio.Queue[tuple[int, Progress] | EngineError] = asyncio.Queue()
        self.numbers: list[int] = []
        """The engine's, of each request; the thread alone reads and writes them."""

    def put(self, arrived: tuple[int, Progress] | EngineError) -> None:
        """Hand over what the engine wrote; called in the event loop."""
        if self._left and not isinstance(arrived, EngineError):
            self._watch(*arrived)
        self._inbox.put_nowait(arrived)

    def __aiter__(self) -> AsyncIterator[tuple[int, Progress]]:
        return self

    async def __anext__(self) -> tuple[int, Progress]:
        """Raises EngineError when the engine failed."""
        if not self._left:
            raise StopAsyncIteration
        arrived = await self._inbox.get()
        if isinstance(arrived, EngineError):
            raise arrived
        self._left -= arrived[1].completion is not None
        return arrived

    def close(self) -> None:
        """Cancel what is not finished."""
        if self._left:
            self._left = 0
            self._forget(self)
