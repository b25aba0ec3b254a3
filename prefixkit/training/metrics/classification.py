"""How often the right label was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefixkit.errors import DataError


def classification_scores(chosen: Sequence[str], right: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """`accuracy` and `macro_f1`, both 0 to 100; the mean of F1 is over all `labels`, 0 for one that never occurs.

    Raises DataError when there is nothing to score.
    """
    hits = accuracy(chosen, right)
    mean = sum(_f1(chosen, right, label) for label in labels) / len(labels)
    return {**hits, "macro_f1": 100 * mean}


def accuracy(chosen: Sequence[Any], right: Sequence[Any]) -> dict[str, float]:
    """`accuracy`, 0 to 100. Raises DataError when there is nothing to score."""
    if not chosen or len(chosen) != len(right):
        found = f"{len(chosen)} choices for {len(right)} examples"
        raise DataError("evaluation", expected="a choice for every example", found=found)
    return {"accuracy": 100 * sum(one == other for one, other in zip(chosen, right, strict=True)) / len(chosen)}


def _f1(chosen: Sequence[str], right: Sequence[str], label: str) -> float:
    both = sum(one == other == label for one, other in zip(chosen, right, strict=True))
    named = sum(one == label for one in chosen) + sum(one == label for one in right)
    return 2 * both / named if named else 0.0
