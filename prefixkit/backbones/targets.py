"""The logits of targets, some at a time: [tokens, vocab] of a large vocabulary is larger than everything else.

A loss over them is a sum over tokens, so that its gradient at the states before the output layer can be computed along
with it, part by part, and no logits outlive their part (as Cut Cross-Entropy does, Wijmans et al. 2024, arXiv
2411.09009, with parts of the vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits that a part holds at most, by device: 64 and 256 MiB of float32, of which three copies are alive at once."""
_ENOUGH = 512
"""Tokens of a part on a CPU, at most: more are no faster there."""

Logits = Callable[[Tensor], Tensor]
"""[tokens, hidden] -> [tokens, vocab]."""
LossOf = Callable[[Tensor, slice], Tensor]
"""The summed loss of some targets: their logits [tokens, vocab], and which of all targets they are."""


def most(device: torch.device, vocabulary: int) -> int:
    """Logits that a part holds at most on `device`."""
    if device.type == "cuda":
        return ELEMENTS["cuda"]
    return min(ELEMENTS["cpu"], _ENOUGH * vocabulary)


@dataclass(frozen=True)
class Targets:
    """What predicts the targets of a batch, in their order.

    Attributes:
        states: [tokens, hidden], what the output layer is given.
        logits_of: the output layer, and whatever follows it.
        vocabulary: how many logits a token has.
        frozen: whether nothing in the output layer wants a gradient.
    """

    states: Tensor
    logits_of: Logits
    vocabulary: int
    frozen: bool = True

    def parts(self, elements: int | None = None) -> Iterator[slice]:
        """The targets, in about equal parts, whose logits are at most `elements`, or the device's, or a token's."""
        largest = max(1, (elements or most(self.states.device, self.vocabulary)) // self.vocabulary)
        count = -(-len(self.states) // largest)
        for part in range(count):
            yield slice(*(len(self.states) * end // count for end in (part, part + 1)))

    def summed(self, loss_of: LossOf, elements: int | None = None) -> Tensor:
        """The sum of `loss_of` over all targets: the value and the gradient of all logits at once."""
        parts = list(self.parts(elements))
        if not self.frozen:
            losses = [loss_of(self.logits_of(self.states[part]), part) for part in parts]
            return torch.stack(losses).sum()
        total: Tensor = _InParts.apply(self.states, self.logits_of, loss_of, parts)  # type: ignore[no-untyped-call]
        return total


class Output:
    """The output layer of a model, and what we know to follow it."""

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        self.head, self.bias = head, getattr(model, "final_logits_bias", None)
        self.cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """In a `with` block the layer maps the first of [1, tokens, hidden] alone, and all of them are left here."""
        states: list[Tensor] = []

        def before(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            states.append(given[0][0])
            return (given[0][:, :1].detach(),)

        hook = self.head.register_forward_pre_hook(before)
        try:
            yield states
        finally:
            hook.remove()

    def __call__(self, states: Tensor) -> Tensor:
        """Their logits."""
        logits: Tensor = self.head(states)
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @torch.no_grad()
    def matches(self, states: Tensor, row: Tensor) -> bool:
        """Whether `row` [1, vocab], of the whole model, is what we make of the first of `states`."""
        return torch.allclose(self(states[:1]), row, rtol=1e-2, atol=1e-4)

    def targets(self, states: Tensor, row: Tensor) -> Targets:
        """`states` on their way to logits."""
        return Targets(states, self, row.shape[-1], frozen=not row.requires_grad)


class _InParts(torch.autograd.Function):
    """The gradient is computed on the way forward, where the logits are, and waits as [tokens, hidden]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, logits_of: Logits, loss_of: LossOf, parts: list[slice]) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states) if wanted else None
        losses = []
        for part in parts:
            with torch.set_grad_enabled(wanted):
                own = states[part].detach().requires_grad_(wanted)
                loss = loss_of(logits_of(own), part)
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(loss, own)
            losses.append(loss.detach())
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * given[0].to(gradient.dtype), None, None, None
