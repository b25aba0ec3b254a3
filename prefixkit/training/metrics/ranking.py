"""How high the right word stands in a masked language model's list, as LAMA (Petroni et al. 2019) is scored."""

from __future__ import annotations

from collections.abc import Sequence

from prefixkit.errors import DataError


def ranking_scores(ranks: Sequence[int]) -> dict[str, float]:
    """`p_at_1` and `p_at_10`, 0 to 100, and `mrr`, the mean of 1 / rank, of ranks that count from 1.

    Raises DataError when there is nothing to score.
    """
    if not ranks:
        raise DataError("evaluation", expected="a word to rank", found="none")
    shares = {f"p_at_{top}": 100 * sum(rank <= top for rank in ranks) / len(ranks) for top in (1, 10)}
    return {**shares, "mrr": sum(1 / rank for rank in ranks) / len(ranks)}
