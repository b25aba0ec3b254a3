"""Ctrl-C between steps: a step that has begun is finished, so that what is kept is the state of a whole step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Hold back Ctrl-C and SIGTERM; the function that is yielded raises KeyboardInterrupt if one of them came.

    Only the main thread can hold signals back; in another one nothing changes.
    """
    pressed: list[int] = []

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    def remember(number: int, frame: Any) -> None:
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    previous = {number: signal.signal(number, remember) for number in _SIGNALS}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
