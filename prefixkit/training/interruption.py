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


class _Held:
    """Signals that are held back."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell, self.pressed = tell, False

    def check(self) -> None:
        if self.pressed:
            raise KeyboardInterrupt

    def remember(self, number: int, frame: Any) -> None:
        if self.pressed:
            raise AtOnce
        self.pressed = True
        self.tell("finishing this step; once more stops at once and keeps the last checkpoint only")


@contextmanager
def between_steps(tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold back Ctrl-C and SIGTERM; the function that is yielded raises KeyboardInterrupt if one of them came.

    A second one raises `AtOnce` wherever it meets the program. Only the main thread can hold signals back; in another
    one nothing changes. In the block of an outer one its function is yielded, so that what came in the last step of one
    run is known before the next.
    """
    held, outer = _Held(tell), getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if threading.current_thread() is not threading.main_thread():
        yield held.check
        return
    if isinstance(outer, _Held):
        yield outer.check
        return
    previous = {number: signal.signal(number, held.remember) for number in _SIGNALS}
    try:
        yield held.check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
