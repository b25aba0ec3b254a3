"""Counts of word sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of `n` words occurs."""
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
