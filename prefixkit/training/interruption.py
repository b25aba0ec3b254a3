"""Ctrl-C between steps: a step that has begun is finished, so that what is kept is the state of a whole step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class AtOnce(KeyboardInterrupt):
    """The second Ctrl-C: it may have met a step half done, so only the last checkpoint is to be trusted."""


@contextmanager
def between_steps(tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold back Ctrl-C and SIGTERM; the function that is yielded raises KeyboardInterrupt if one of them came.

    A second one raises `AtOnce` wherever it meets the program. Only the main thread can hold signals back; in another
    one nothing changes.
    """
    pressed: list[int] = []

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    def remember(number: int, frame: Any) -> None:
        if pressed:
            raise AtOnce
        pressed.append(number)
        tell("finishing this step; once more stops at once and keeps the last checkpoint only")

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    previous = {number: signal.signal(number, remember) for number in _SIGNALS}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
