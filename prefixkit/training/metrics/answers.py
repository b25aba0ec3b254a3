"""Exact match and F1 of short answers, as the script of SQuAD 2 computes them (Rajpurkar et al. 2018, 1806.03822)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from prefixkit.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_scores(chosen: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """`f1` and `exact_match`, both 0 to 100: means over the questions of the best among each one's right answers.

    A question without a right answer is answered by an empty text.

    Raises DataError when there is nothing to score.
    """
    if not chosen or len(chosen) != len(right):
        found = f"{len(chosen)} for {len(right)} questions"
        raise DataError("evaluation", expected="an answer for every question", found=found)
    f1 = [max(_f1(one, other) for other in _known(answers)) for one, answers in zip(chosen, right, strict=True)]
    exact = [max(_same(one, other) for other in _known(answers)) for one, answers in zip(chosen, right, strict=True)]
    return {"f1": 100 * sum(f1) / len(f1), "exact_match": 100 * sum(exact) / len(exact)}


def answer_words(text: str) -> list[str]:
    """The words that count: in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _known(answers: Sequence[str]) -> list[str]:
    return [answer for answer in answers if answer_words(answer)] or [""]


def _same(one: str, other: str) -> float:
    return float(answer_words(one) == answer_words(other))


def _f1(one: str, other: str) -> float:
    ours, theirs = answer_words(one), answer_words(other)
    if not ours or not theirs:
        return float(ours == theirs)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs))
