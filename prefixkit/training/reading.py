"""Tasks that a head answers: what training minimises, and what the head chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.heads import read
from prefixkit.data.batches import IGNORED, Collate
from prefixkit.errors import InputError
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import Injection, TaskHead, part_of
from prefixkit.training.metrics.classification import classification_scores
from prefixkit.training.metrics.tagging import tagging_scores


def answer_loss(backbone: Backbone, batch: Any, received: Injection | None) -> Tensor:
    """The summed cross-entropy of the labels, in nats."""
    outputs, labels = outputs_of(backbone, batch, received), batch.labels.to(backbone.device)
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def outputs_of(backbone: Backbone, batch: Any, received: Injection | None) -> Tensor:
    """What the head makes of a batch: [batch, labels], or [batch, seq, labels] for tags.

    Raises:
        InputError: no head.
    """
    head = part_of(received, TaskHead)
    if head is None:
        raise InputError("prefix", expected="a task head", found="none", next_step="train one for this task")
    inputs = {name: tensor.to(backbone.device) for name, tensor in batch.inputs.items()}
    return read(head, backbone.states(inputs, received), inputs.get("attention_mask"))


def scores_of(task: TaskRecord, examples: Sequence[Any], chosen: Sequence[list[int]]) -> dict[str, float]:
    """The metrics of `chosen`, the numbers of the labels for each example."""
    right, ours = [example.answer for example in examples], named(task, examples, chosen)
    if task.answer == "label":
        return classification_scores(ours, right, list(task.labels or ()))
    return tagging_scores(ours, right)


def named(task: TaskRecord, examples: Sequence[Any], chosen: Sequence[list[int]]) -> list[Any]:
    """What the numbers in `chosen` say: a label for each example, or a tag for each of its words."""
    if task.answer == "label":
        return [(task.labels or ())[first] for first, *_ in chosen]
    return [_tags(task, row, len(one.answer)) for row, one in zip(chosen, examples, strict=True)]


def _tags(task: TaskRecord, chosen: Sequence[int], words: int) -> list[str]:
    """The tags of all `words`; those that did not fit get the first label, which is `O` where there is one."""
    labels = list(task.labels or ())
    return [labels[number] for number in chosen] + [labels[0]] * (words - len(chosen))


@torch.no_grad()
def answers(
    backbone: Backbone,
    rows: Sequence[Any],
    received: Injection | None,
    collate: Collate,
    *,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """The numbers of the labels that the head chooses for each row: one, or one for each word that fit."""
    chosen: dict[int, list[int]] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    received = backbone.fold(received) if received is not None else None
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate([rows[index] for index in indices])
        best = outputs_of(backbone, batch, received).argmax(dim=-1).cpu()
        for row, index in enumerate(indices):
            learned = batch.labels[row] != IGNORED
            chosen[index] = best[row][learned].tolist() if best.ndim == 2 else [int(best[row])]
        done(len(chosen))
    return [chosen[index] for index in range(len(rows))]
