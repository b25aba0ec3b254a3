"""Texts that begin alike, each beginning read once.

In a decoder a token's states depend on what stands before it alone, so that the texts of a batch are a trie: whatever
works token by token works on its nodes, in a single row, and attention alone has its rows. Losses and gradients stay
what they are (Liu et al. 2025, arXiv 2506.05433, share one prompt so); padding is not computed either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ENOUGH = 0.97
"""Nodes, of the places in padded rows, up to which it is faster: attention copies them into rows and back."""


@dataclass(frozen=True)
class Trie:
    """The distinct beginnings of some texts, those of the first text first.

    Attributes:
        ids: [1, nodes], the last token of each; behind them, first tokens once more, to fill the row up.
        nodes: [batch, longest], the beginning that ends at each token; -1 behind a text's end.
    """

    ids: Tensor
    nodes: Tensor

    @cached_property
    def spread(self) -> Tensor:
        """[batch * longest]: whose states stand at each place of the rows; behind a text's end, those of its end."""
        # Not anyone's: what is masked still makes NaN of everything where it is NaN, as in another run's row.
        return self.nodes.cummax(dim=1).values.flatten()

    @cached_property
    def size(self) -> int:
        """Nodes, without what fills the row up."""
        return int(self.nodes.max()) + 1

    @cached_property
    def first(self) -> Tensor:
        """[nodes]: the place in the rows where each beginning ends first; 0 for what fills the row up."""
        found = self._is_first.nonzero()[:, 0]
        return F.pad(found, (0, self.ids.shape[1] - len(found)))

    @cached_property
    def others(self) -> Tensor:
        """All other places: there a beginning ends once more, or nothing stands."""
        return (~self._is_first).nonzero()[:, 0]

    @cached_property
    def repeated(self) -> Tensor:
        """The places where a beginning ends once more."""
        return self.others[self.nodes.flatten()[self.others] >= 0]

    @cached_property
    def _is_first(self) -> Tensor:
        known = self.nodes.flatten().cummax(dim=0).values
        return known > F.pad(known, (1, -1), value=-1)

    @cached_property
    def depths(self) -> Tensor:
        """[1, nodes]: how many tokens of its text stand before each."""
        return (self.first % self.nodes.shape[1])[None]

    @cached_property
    def owners(self) -> Tensor:
        """[nodes]: a text that each is of."""
        return self.first // self.nodes.shape[1]

    @cached_property
    def first_at(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of `first`."""
        return self.owners, self.depths[0]

    @cached_property
    def repeated_at(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of `repeated`."""
        return self.repeated // self.nodes.shape[1], self.repeated % self.nodes.shape[1]

    def filled(self, more: int) -> Trie:
        """The same with so many places behind the nodes."""
        return replace(self, ids=F.pad(self.ids, (0, more), value=int(self.ids[0, 0])))

    def rows(self, states: Tensor) -> Tensor:
        """[1, heads, nodes, width] as [batch, heads, longest, width]."""
        made: Tensor = _Rows.apply(states, self)  # type: ignore[no-untyped-call]
        return made

    def row(self, states: Tensor) -> Tensor:
        """[batch, longest, heads, width] as [1, nodes, heads, width]."""
        made: Tensor = _Row.apply(states, self)  # type: ignore[no-untyped-call]
        return made


def trie(ids: Tensor, lengths: Tensor, groups: Sequence[int]) -> Trie:
    """The trie of the first `lengths` [batch] tokens, one or more, of each row of `ids` [batch, seq].

    Args:
        groups: of the rows; only those of one group share anything.
    """
    known: dict[tuple[int, int], int] = {}
    nodes = torch.full((len(ids), int(lengths.max())), -1)
    for row, (text, length, group) in enumerate(zip(ids.tolist(), lengths.tolist(), groups, strict=True)):
        path = [-1 - group]
        for token in text[:length]:
            path.append(known.setdefault((path[-1], token), len(known)))
        nodes[row, :length] = torch.tensor(path[1:])
    return Trie(torch.tensor([[token for _, token in known]]), nodes)


class _Rows(torch.autograd.Function):
    """The states of each node wherever it is. Its gradient is summed over these places."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, trie: Trie) -> Tensor:
        ctx.trie = trie
        rows = states[0].transpose(0, 1).index_select(0, trie.spread)
        return rows.view(*trie.nodes.shape, *rows.shape[1:]).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> Any:
        trie: Trie = ctx.trie
        found = given.transpose(1, 2)[trie.first_at]
        found[trie.size :] = 0
        if len(trie.repeated):
            found.index_add_(0, trie.spread[trie.repeated], given.transpose(1, 2)[trie.repeated_at])
        return found.transpose(0, 1)[None], None


class _Row(torch.autograd.Function):
    """The states of each node where it is first."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, trie: Trie) -> Tensor:
        ctx.trie = trie
        return states.flatten(0, 1).index_select(0, trie.first)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> Any:
        trie: Trie = ctx.trie
        found = given[0].index_select(0, trie.spread).index_fill_(0, trie.others, 0)
        return found.view(*trie.nodes.shape, *given.shape[2:]), None
