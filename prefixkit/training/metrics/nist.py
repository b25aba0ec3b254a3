"""NIST (Doddington, 2002) as mteval-v13a and the E2E challenge's script compute it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from prefixkit.training.metrics.ngrams import ngrams
from prefixkit.training.metrics.words import mteval_words

ORDER = 5
BETA = -math.log(0.5) / math.log(1.5) ** 2
"""Makes the brevity penalty 0.5 for an output of two thirds of the references' mean length."""

NGram = tuple[str, ...]


def nist(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Information-weighted n-gram precision, n = 1 to 5, times a brevity penalty. It has no upper bound."""
    outputs = [mteval_words(hypothesis) for hypothesis in hypotheses]
    groups = [[mteval_words(reference) for reference in group] for group in references]
    information = _information(groups)
    score = 0.0
    for n in range(1, ORDER + 1):
        gained = sum(_gained(output, group, n, information) for output, group in zip(outputs, groups, strict=True))
        # Outputs shorter than n count negatively, as in the challenge's script.
        possible = sum(len(output) - n + 1 for output in outputs)
        score += gained / possible if possible > 0 else 0.0
    mean_length = sum(sum(map(len, group)) / len(group) for group in groups)
    return score * _penalty(sum(map(len, outputs)), mean_length)


def _information(groups: Sequence[Sequence[Sequence[str]]]) -> dict[NGram, float]:
    """log2(count(w1..wn-1) / count(w1..wn)) over all references of the test set."""
    counts: Counter[NGram] = Counter()
    for reference in (reference for group in groups for reference in group):
        for n in range(ORDER + 1):
            counts.update(ngrams(reference, n) if n else {(): len(reference)})
    return {ngram: math.log2(counts[ngram[:-1]] / count) for ngram, count in counts.items() if ngram}


def _gained(output: Sequence[str], group: Sequence[Sequence[str]], n: int, information: dict[NGram, float]) -> float:
    """The information of the output's n-grams, each counted at most as often as in the reference that has it most."""
    allowed: Counter[NGram] = Counter()
    for reference in group:
        allowed |= ngrams(reference, n)
    return sum(count * information[ngram] for ngram, count in (ngrams(output, n) & allowed).items())


def _penalty(length: int, reference_length: float) -> float:
    if length == 0 or reference_length == 0:
        return 0.0
    return math.exp(-BETA * math.log(min(1.0, length / reference_length)) ** 2)
