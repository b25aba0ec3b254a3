"""A head behind whatever a method trains, trained with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefixkit.injections import Injection, TaskHead, joined, parts_of
from prefixkit.methods.method import Method

_SPREAD = 0.02
"""The standard deviation that BERT's code gives the weights of a new head."""


class WithHead(Method):
    """A method and a linear head of its task. Calling the module gives both, with gradients.

    Args:
        body: the method; None trains the head alone.
        outputs: of the head.
        hidden: the width of the backbone's states.
        reads: `first`, `last`, `mean` or `each`: which states the head maps.
        start: the head to begin at, instead of a random one.
    """

    def __init__(
        self,
        body: Method | None,
        *,
        outputs: int,
        hidden: int,
        reads: str,
        seed: int = 0,
        start: TaskHead | None = None,
    ) -> None:
        super().__init__()
        self.body, self.reads = body, reads
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(outputs, hidden, generator=generator) * _SPREAD
        self.head_weight = nn.Parameter(weight if start is None else start.weight.float())
        self.head_bias = nn.Parameter(torch.zeros(outputs) if start is None else start.bias.float())

    def forward(self) -> Injection:
        """What the current parameters make."""
        return self._behind(self.body() if self.body is not None else None, self.head_weight, self.head_bias)

    @torch.no_grad()
    def fold(self) -> Injection:
        """The same as constants."""
        body = self.body.fold() if self.body is not None else None
        return self._behind(body, self.head_weight.detach().clone(), self.head_bias.detach().clone())

    def _behind(self, body: Injection | None, weight: Tensor, bias: Tensor) -> Injection:
        return joined((*parts_of(body), TaskHead(weight=weight, bias=bias, reads=self.reads)))
