"""How the metrics cut text into words."""

from __future__ import annotations

from functools import cache

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

COCO_PUNCTUATION = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";", *"(){}"])


def mteval_words(text: str) -> list[str]:
    """Lower-cased words as mteval-v13a cuts them, punctuation apart: for NIST, and inside sacrebleu for BLEU."""
    return str(_tokenizer()(text)).lower().split()


def coco_words(text: str) -> list[str]:
    """Lower-cased words without punctuation, for ROUGE-L and CIDEr.

    The COCO caption script cuts with Stanford's PTBTokenizer and drops the same punctuation. 13a stands in for it
    here; on E2E's text, which is tokenised already, the two differ in little but contractions written as one word.
    """
    return [word for word in mteval_words(text) if word not in COCO_PUNCTUATION]


@cache
def _tokenizer() -> Tokenizer13a:
    return Tokenizer13a()
