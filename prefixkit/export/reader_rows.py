"""Where a prompt's rows stand among the tokens of an input, in operations that a graph can have."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixkit.task import SLOT_ID


def inserted(placement: str | None, rows: Tensor, each: Tensor) -> Tensor:
    """`each` [batch, seq, …], with `rows` [batch, prompt, …] in their places; slots are places of the text."""
    match placement:
        case "prepend":
            return torch.cat([rows, each], dim=1)
        case "after_first":
            return torch.cat([each[:, :1], rows, each[:, 1:]], dim=1)
        case _:
            return each


def without(placement: str | None, rows: Tensor, each: Tensor) -> Tensor:
    """`each` [batch, placed, …] without what stands in the places of `rows`."""
    match placement:
        case "prepend":
            return each[:, rows.shape[1] :]
        case "after_first":
            return torch.cat([each[:, :1], each[:, 1 + rows.shape[1] :]], dim=1)
        case _:
            return each


def chosen(rows: Tensor, which: Tensor) -> Tensor:
    """[batch, seq, hidden]: the `rows` [batch, rows, hidden] that `which` [batch, seq] counts from 1; 0 is none."""
    # Not zeros like `rows[:, :1]`, which has no row where there are none.
    padded = torch.cat([rows.new_zeros(rows.shape[0], 1, rows.shape[2]), rows], dim=1)
    return padded.gather(1, which[..., None].expand(-1, -1, rows.shape[2]))


def slots(ids: Tensor) -> Tensor:
    """[batch, seq]: the slots of each row, counted from 1; 0 for tokens."""
    slot = (ids == SLOT_ID).long()
    return slot.cumsum(dim=1) * slot


def filled(vectors: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """`vectors` [batch, seq, hidden] of the tokens `ids` [batch, seq], with the `rows` of the prompt in the slots."""
    return torch.where((ids == SLOT_ID)[..., None], chosen(rows, slots(ids)), vectors)


def counted(like: Tensor, begin: int, count: int) -> Tensor:
    """[batch, seq]: from place `begin` on, `count` places are counted from 1; 0 elsewhere."""
    number = torch.arange(like.shape[1], device=like.device) - begin + 1
    return torch.zeros_like(like) + torch.where((number > 0) & (number <= count), number, 0)
