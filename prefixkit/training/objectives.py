"""What training minimises: each is the summed loss in nats of a batch's target tokens, only their logits computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.backbone import Backbone
from prefixkit.data.batches import Batch
from prefixkit.injections import Injection

Objective = Callable[[Backbone, Any, Injection | None], Tensor]
TOP = 20
"""How many of the teacher's most likely tokens are kept, as in the code of cartridges."""


def next_token(backbone: Backbone, batch: Batch, received: Injection | None) -> Tensor:
    """The cross-entropy of the targets themselves."""
    labels = batch.labels.to(backbone.device)
    return cross_entropy_sum(_target_logits(backbone, batch, received), labels)


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
        with torch.no_grad():
            wanted = _target_logits(backbone, batch, self.teacher)
        return soft_cross_entropy_sum(_target_logits(backbone, batch, received), wanted, self.top)


@dataclass(frozen=True)
class AmongLabels:
    """The cross-entropy of the targets among the words that stand for labels, as PET and null prompts are trained.

    Attributes:
        words: the token of each label.
    """

    words: tuple[int, ...]

    def __call__(self, backbone: Backbone, batch: Batch, received: Injection | None) -> Tensor:
        """The summed loss of a batch, which has one target an example."""
        labels = batch.labels.to(backbone.device)
        known = torch.tensor(self.words, device=backbone.device)
        right = (labels[labels != -100][:, None] == known).long().argmax(dim=1)
        logits = _target_logits(backbone, batch, received)[:, known]
        return F.cross_entropy(logits.float(), right, reduction="sum")


def _target_logits(backbone: Backbone, batch: Batch, received: Injection | None) -> Tensor:
    labels = batch.labels.to(backbone.device)
    tokens, mask = batch.input_ids.to(backbone.device), batch.attention_mask.to(backbone.device)
    return backbone.target_logits(tokens, mask, labels, received)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of the labelled tokens.

    Args:
        logits: [tokens, vocab], what a backbone's `target_logits` gives for `labels`.
        labels: [batch, seq], -100 where nothing is to be learnt.
    """
    wanted = labels[labels != -100]
    return F.cross_entropy(logits.float(), wanted, reduction="sum")


def soft_cross_entropy_sum(logits: Tensor, teacher: Tensor, top: int = TOP) -> Tensor:
    """Summed cross-entropy in nats against the `top` most likely tokens of `teacher`, whose shares stay as they are.

    Args:
        logits: [tokens, vocab].
        teacher: [tokens, vocab].
    """
    shares, tokens = torch.softmax(teacher.float(), dim=-1).topk(min(top, teacher.shape[-1]), dim=-1)
    return -(shares * torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens)).sum()


def reduced(total: Tensor, *, how: str, tokens: int, examples: int) -> Tensor:
    """`mean` over target tokens; `sum` over an example's tokens, mean over examples, as Prefix-Tuning's code does."""
    return total / (tokens if how == "mean" else examples)
