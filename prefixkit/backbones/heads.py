"""What a task head reads of a backbone's final states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.injections import TaskHead


def read(head: TaskHead, states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The outputs of `head`: [batch, labels], or [batch, seq, labels] where it reads `each` state.

    Args:
        states: [batch, seq, hidden].
        attention_mask: [batch, seq], 1 for a real token, padding on the right; None for images, which have none.
    """
    chosen = _chosen(head.reads, states, attention_mask)
    return F.linear(chosen, head.weight.to(chosen), head.bias.to(chosen)).float()


def read_each(heads: Sequence[TaskHead], owner: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
    """The same where row `i` is answered by `heads[owner[i]]`, all of one size, which read the same states."""
    chosen = _chosen(heads[0].reads, states, attention_mask)
    weight, bias = (
        torch.stack(each).to(chosen)[owner] for each in ([one.weight for one in heads], [one.bias for one in heads])
    )
    outputs = torch.baddbmm(bias[:, None], chosen.view(len(owner), -1, chosen.shape[-1]), weight.mT)
    return outputs.view(*chosen.shape[:-1], -1).float()


def _chosen(reads: str, states: Tensor, mask: Tensor | None) -> Tensor:
    match reads:
        case "each":
            return states
        case "first":
            return states[:, 0]
        case "last":
            return states[:, -1] if mask is None else _at(states, mask.sum(dim=1) - 1)
        case _:
            # An image's first state is its [CLS], no part of the image.
            shares = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
            shares = shares if mask is not None else shares.index_fill(1, shares.new_zeros(1).long(), 0.0)
            return (states * shares[..., None]).sum(dim=1) / shares.sum(dim=1, keepdim=True)


def _at(states: Tensor, places: Tensor) -> Tensor:
    """[batch, hidden]: the state of each row at its place."""
    # Not by indexing with a range, whose length a tracer would take for a constant.
    return states.gather(1, places[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
