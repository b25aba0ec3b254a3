"""Corpus BLEU (Papineni et al., 2002), configured to equal the E2E challenge's script."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import sacrebleu


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Case-insensitive BLEU-4 with 13a words and no smoothing, 0 to 100.

    Hypotheses may have different numbers of references: sacrebleu takes columns, padded with None.
    """
    columns = [list(column) for column in zip_longest(*references)]
    score = sacrebleu.corpus_bleu(
        list(hypotheses),
        columns,
        lowercase=True,
        tokenize="13a",
        smooth_method="none",
        force=True,  # tokenised text is what E2E has; without this sacrebleu warns
    )
    return float(score.score)
