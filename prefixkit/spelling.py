"""A next step for a name that is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'prefix-tuning'?` where one of `known` is close to `word`, else a list of what there is."""
    choices = list(known)
    by_folded = {choice.casefold(): choice for choice in reversed(choices)}
    close = get_close_matches(word.casefold(), by_folded, n=1)
    if close:
        return f"did you mean {by_folded[close[0]]!r}?"
    return f"choose from {', '.join(choices)}" if choices else "there is none to choose from"
