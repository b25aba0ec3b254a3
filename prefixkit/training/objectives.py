"""What training minimises."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of the labelled tokens.

    Args:
        logits: [tokens, vocab], what a backbone's `target_logits` gives for `labels`.
        labels: [batch, seq], -100 where nothing is to be learnt.
    """
    wanted = labels[labels != -100]
    return F.cross_entropy(logits.float(), wanted, reduction="sum")


def reduced(total: Tensor, *, how: str, tokens: int, examples: int) -> Tensor:
    """`mean` over target tokens; `sum` over an example's tokens, mean over examples, as Prefix-Tuning's code does."""
    return total / (tokens if how == "mean" else examples)
