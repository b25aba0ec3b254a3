"""What training minimises."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def next_token_positions(labels: Tensor) -> Tensor:
    """[batch, seq] bool: where the logits are that predict a labelled token, one position before it."""
    chosen = (labels != -100).roll(-1, dims=1)
    chosen[:, -1] = False
    return chosen


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of the labelled tokens.

    Args:
        logits: [tokens, vocab] at `next_token_positions(labels)`.
        labels: [batch, seq], -100 where nothing is to be learnt.
    """
    wanted = labels[:, 1:][labels[:, 1:] != -100]
    return F.cross_entropy(logits.float(), wanted, reduction="sum")


def reduced(total: Tensor, *, how: str, tokens: int, examples: int) -> Tensor:
    """`mean` over target tokens; `sum` over an example's tokens, mean over examples, as Prefix-Tuning's code does."""
    return total / (tokens if how == "mean" else examples)
