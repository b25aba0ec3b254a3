"""What training minimises: each is the summed loss in nats of a batch's target tokens, only their logits computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.targets import Targets
from prefixkit.data.batches import Batch
from prefixkit.injections import Injection
from prefixkit.training.layout import laid

Objective = Callable[[Backbone, Any, Injection | None], Tensor]
TOP = 20
"""How many of the teacher's most likely tokens are kept, as in the code of cartridges."""


def next_token(backbone: Backbone, batch: Batch, received: Injection | None) -> Tensor:
    """The cross-entropy of the targets themselves."""
    wanted = _wanted(backbone, batch)
    with _targets(backbone, batch, received) as targets:
        return targets.summed(lambda logits, part: cross_entropy_sum(logits, wanted[part]))


@dataclass(frozen=True)
class Distillation:
    """The cross-entropy of what the backbone says at the targets' places when it receives `teacher`.

    Attributes:
        top: how many of its likeliest tokens are imitated.
    """

    teacher: Injection
    top: int = TOP

    def __call__(self, backbone: Backbone, batch: Batch, received: Injection | None) -> Tensor:
        """The summed loss of a batch."""
        with torch.no_grad(), _targets(backbone, batch, self.teacher) as taught:
            parts = [likeliest(taught.logits_of(taught.states[part]), self.top) for part in taught.parts()]
        shares, tokens = (torch.cat(each) for each in zip(*parts, strict=True))
        with _targets(backbone, batch, received) as targets:
            return targets.summed(lambda logits, part: soft_cross_entropy_sum(logits, shares[part], tokens[part]))


@dataclass(frozen=True)
class AmongLabels:
    """The cross-entropy of the targets among the words that stand for labels, as PET and null prompts are trained.

    Attributes:
        words: the token of each label.
    """

    words: tuple[int, ...]

    def __call__(self, backbone: Backbone, batch: Batch, received: Injection | None) -> Tensor:
        """The summed loss of a batch, which has one target an example."""
        known = torch.tensor(self.words, device=backbone.device)
        right = (_wanted(backbone, batch)[:, None] == known).long().argmax(dim=1)
        with _targets(backbone, batch, received) as targets:
            return targets.summed(lambda logits, part: cross_entropy_sum(logits[:, known], right[part]))


def _wanted(backbone: Backbone, batch: Batch) -> Tensor:
    """[tokens]: the targets, row by row."""
    return batch.labels[batch.labels != -100].to(backbone.device)


def _targets(backbone: Backbone, batch: Batch, received: Injection | None) -> AbstractContextManager[Targets]:
    batch = batch.to(backbone.device)
    return backbone.targets(batch.input_ids, batch.attention_mask, batch.labels, laid(backbone, batch, received))


def cross_entropy_sum(logits: Tensor, wanted: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of the tokens `wanted` [tokens], given `logits` [tokens, vocab]."""
    return F.cross_entropy(exact(logits), wanted, reduction="sum")


def exact(logits: Tensor) -> Tensor:
    """In float32, or in float64 where they are that."""
    return logits if logits.dtype == torch.float64 else logits.float()


def likeliest(logits: Tensor, top: int = TOP) -> tuple[Tensor, Tensor]:
    """The `top` most likely tokens under `logits` [tokens, vocab]: their shares of the whole, and which they are."""
    shares, tokens = torch.softmax(exact(logits), dim=-1).topk(min(top, logits.shape[-1]), dim=-1)
    return shares, tokens


def soft_cross_entropy_sum(logits: Tensor, shares: Tensor, tokens: Tensor) -> Tensor:
    """Summed cross-entropy in nats against the most likely tokens of a teacher, whose shares stay as they are.

    Args:
        logits: [tokens, vocab].
        shares, tokens: [tokens, top], what `likeliest` makes of the teacher's logits.
    """
    return -(shares * torch.log_softmax(exact(logits), dim=-1).gather(-1, tokens)).sum()


def reduced(total: Tensor, *, how: str, tokens: float, examples: float) -> Tensor:
    """`mean` over target tokens; `sum` over an example's tokens, mean over examples, as Prefix-Tuning's code does."""
    return total / (tokens if how == "mean" else examples)
