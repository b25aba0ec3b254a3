"""Text of unknown origin on a terminal: what could steer the terminal is shown, not sent."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with control characters, ANSI escapes among them, and unprintable ones spelled out as in `\\x1b`."""
    return "".join(character if character.isprintable() else _spelled(character) for character in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()
