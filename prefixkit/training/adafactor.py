"""Adafactor as prompt tuning specifies it (Lester et al. 2021; Shazeer & Stern 2018, arXiv 1804.04235).

The second moment is kept whole (a prompt is small), the learning rate is not scaled by the parameter, and weight decay
is not scaled by the learning rate. No library offers this combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_DECAY = 0.8
_TINY = 1e-30


class Adafactor(torch.optim.Optimizer):
    """Updates of root mean square 1 at most, by a second moment that forgets with 1 - step^-0.8."""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state.setdefault("step", 0)
        state.setdefault("second_moment", torch.zeros_like(parameter))
        state["step"] += 1
        kept = 1 - state["step"] ** -_DECAY
        moment = state["second_moment"].mul_(kept).add_(gradient.square() + _TINY, alpha=1 - kept)
        update = gradient * moment.rsqrt()
        update /= update.square().mean().sqrt().clamp(min=1.0)
        parameter.mul_(1 - group["weight_decay"]).add_(update, alpha=-group["lr"])
