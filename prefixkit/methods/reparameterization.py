"""Reparametrisations: what is trained in place of the prefix, and folded away when training ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn

REPARAMETERIZATIONS = ("none", "mlp")


class Direct(nn.Module):
    """No reparametrisation: the prefix itself is the parameter, [prefix, width]."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.prefix = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        """[prefix, width]."""
        return self.prefix


class Steps(nn.Module):
    """A start and, in `unit`s, the way that was gone from it, [prefix, width]: learning rates count in units."""

    start: Tensor

    def __init__(self, start: Tensor, *, unit: float) -> None:
        super().__init__()
        self.register_buffer("start", start.clone())
        self.unit = unit
        self.steps = nn.Parameter(torch.zeros_like(start))

    def forward(self) -> Tensor:
        """[prefix, width]."""
        return self.start + self.unit * self.steps


class MLP(nn.Module):
    """Embedding(prefix, hidden) -> Linear -> Tanh -> Linear, as in Li & Liang 2021, section 4.3.

    The output is added to a constant start. With `exact_start` the last layer begins at zero, so that training begins
    exactly at `start`; the official code reaches its start by fitting instead. Without it the layers begin as the
    official code's do, and `start` should be zeros.
    """

    start: Tensor

    def __init__(self, start: Tensor, *, hidden: int, bottleneck: int = 512, exact_start: bool = True) -> None:
        super().__init__()
        length, width = start.shape
        self.register_buffer("start", start.clone())
        self.embedding = nn.Embedding(length, hidden)
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        if exact_start:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self) -> Tensor:
        """[prefix, width]."""
        moved: Tensor = self.up(torch.tanh(self.down(self.embedding.weight)))
        return self.start + moved
