"""Texts that end an answer: found across pieces, and never shown, not even in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Holds back the end of a text for as long as it may be the beginning of one of `stops`."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.met = tuple(stops), "", False

    def push(self, piece: str) -> str:
        """More text; gives what is certain by now. `met` is True from the piece on in which a stop text is whole."""
        text = self.held + piece
        at = min((place for place in map(text.find, self.stops) if place >= 0), default=None)
        if at is not None:
            self.held, self.met = "", True
            return text[:at]
        keep = max((self._open(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The rest, once no more text comes."""
        rest, self.held = self.held, ""
        return rest

    def _open(self, text: str, stop: str) -> int:
        """How many letters at the end of `text` begin `stop`."""
        return next((count for count in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:count])), 0)
