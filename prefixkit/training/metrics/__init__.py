"""Scores of generated text against grouped references, as the E2E challenge's script computes them.

BLEU is sacrebleu's. NIST, ROUGE-L and CIDEr are written out here, one file each, because no kept package has them.
ROUGE-L and CIDEr differ from the script in their tokenizer, which is Stanford's and needs Java: see `coco_words`.
METEOR is left out: it needs Java, or WordNet from the network.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefixkit.errors import DataError
from prefixkit.training.metrics.bleu import bleu
from prefixkit.training.metrics.cider import cider
from prefixkit.training.metrics.nist import nist
from prefixkit.training.metrics.rouge_l import rouge_l


def generation_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu` (0 to 100), `nist`, `rouge_l` (0 to 100) and `cider` (0 to 10); `references[i]` are those of hypothesis i.

    Raises DataError when there is no hypothesis, or one without references.
    """
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        raise DataError(
            "evaluation",
            expected="hypotheses, each with at least one reference",
            found=f"{len(hypotheses)} hypotheses, {sum(map(bool, references))} with references",
        )
    return {
        "bleu": bleu(hypotheses, references),
        "nist": nist(hypotheses, references),
        "rouge_l": 100 * rouge_l(hypotheses, references),
        "cider": cider(hypotheses, references),
    }
