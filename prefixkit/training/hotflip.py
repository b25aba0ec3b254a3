"""The search of AutoPrompt as an optimizer: each step may change one token, and never for a worse one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from prefixkit.methods.autoprompt import AutoPrompt


class HotFlip(torch.optim.Optimizer):
    """Draws a slot, asks the gradient for candidates, and keeps the one with the least loss.

    A step needs a closure that gives the loss of a batch, always the same one, with the prompt as it stands; the paper
    takes the batch after the one of the gradient.
    """

    def __init__(self, method: AutoPrompt, *, lr: float) -> None:
        super().__init__(method.parameters(), {"lr": lr})
        self.method = method

    def step(self, closure: Callable[[], float] | None = None) -> float:  # type: ignore[override]
        """Try the candidates of one slot; returns the loss that is left."""
        assert closure is not None
        method = self.method
        slot = int(torch.randint(method.fixed, len(method.token_ids), ()))
        best_token, best = int(method.token_ids[slot]), closure()
        for token in method.likely_better(slot):
            method.put(slot, token)
            if (loss := closure()) < best:
                best_token, best = token, loss
        method.put(slot, best_token)
        return best
