"""ROUGE-L (Lin, 2004) as the COCO caption script computes it."""

from __future__ import annotations

from collections.abc import Sequence

from prefixkit.training.metrics.words import coco_words

BETA = 1.2
"""Recall weighs this much more than precision."""


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F of the longest common subsequence, 0 to 1.

    Precision and recall are each the best over the references, which may be two different ones.
    """
    scores = [_f_score(hypothesis, group) for hypothesis, group in zip(hypotheses, references, strict=True)]
    return sum(scores) / len(scores)


def _f_score(hypothesis: str, group: Sequence[str]) -> float:
    output = coco_words(hypothesis)
    if not output:
        return 0.0
    words = [found for found in map(coco_words, group) if found]
    common = [_common_length(output, reference) for reference in words]
    precision = max((length / len(output) for length in common), default=0.0)
    recall = max((length / len(reference) for length, reference in zip(common, words, strict=True)), default=0.0)
    if precision == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        above_left = 0
        for column, other in enumerate(right, 1):
            above = row[column]
            row[column] = above_left + 1 if word == other else max(above, row[column - 1])
            above_left = above
    return row[-1]
