"""CIDEr (Vedantam et al., 2015) as the COCO caption script of the E2E challenge computes it.

That script's CIDEr has the clipping and the length penalty of CIDEr-D.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prefixkit.training.metrics.ngrams import ngrams
from prefixkit.training.metrics.words import coco_words

ORDER = 4
SIGMA = 6.0
"""Width of the length penalty, in bigrams."""

NGram = tuple[str, ...]


@dataclass(frozen=True)
class _Weighted:
    """The tf-idf weights of one text, one mapping an order."""

    weights: tuple[dict[NGram, float], ...]
    bigrams: int

    def norm(self, order: int) -> float:
        return math.sqrt(sum(weight**2 for weight in self.weights[order].values()))


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean tf-idf similarity to the references, n = 1 to 4; 10 for outputs that equal their only reference.

    Document frequencies are those of the references given, so a single input scores 0.
    """
    groups = [[coco_words(reference) for reference in group] for group in references]
    frequency = _document_frequency(groups)
    documents = math.log(len(groups))
    scores = []
    for hypothesis, group in zip(hypotheses, groups, strict=True):
        output = _weighted(coco_words(hypothesis), frequency, documents)
        similar = [_similarity(output, _weighted(reference, frequency, documents)) for reference in group]
        scores.append(10 * sum(similar) / len(similar))
    return sum(scores) / len(scores)


def _document_frequency(groups: Sequence[Sequence[Sequence[str]]]) -> Counter[NGram]:
    """For each n-gram, the number of inputs with a reference that has it."""
    frequency: Counter[NGram] = Counter()
    for group in groups:
        frequency.update({ngram for words in group for n in range(1, ORDER + 1) for ngram in ngrams(words, n)})
    return frequency


def _weighted(words: Sequence[str], frequency: Counter[NGram], documents: float) -> _Weighted:
    counts = [ngrams(words, n) for n in range(1, ORDER + 1)]
    weights = tuple(
        {ngram: count * (documents - math.log(max(1, frequency[ngram]))) for ngram, count in counted.items()}
        for counted in counts
    )
    return _Weighted(weights, sum(counts[1].values()))


def _similarity(output: _Weighted, reference: _Weighted) -> float:
    penalty = math.exp(-((output.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))
    return penalty * sum(_clipped_cosine(output, reference, order) for order in range(ORDER)) / ORDER


def _clipped_cosine(output: _Weighted, reference: _Weighted, order: int) -> float:
    """The cosine of two weightings, with no weight of the output above the reference's."""
    ours, theirs = output.weights[order], reference.weights[order]
    norms = output.norm(order) * reference.norm(order)
    if norms == 0:
        return 0.0
    return sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs) / norms
