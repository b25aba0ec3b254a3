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
from prefixkit.task import input_fields
from prefixkit.training import layout
from prefixkit.training.metrics.answers import answer_scores
from prefixkit.training.metrics.classification import accuracy, classification_scores
from prefixkit.training.metrics.tagging import tagging_scores


def answer_loss(backbone: Backbone, batch: Any, received: Injection | None) -> Tensor:
    """The summed cross-entropy of the labels, of the choices, or of the first and the last token of spans, in nats."""
    scores, labels = batch.scores(outputs_of(backbone, batch, received)), batch.labels.to(backbone.device)
    return F.cross_entropy(scores.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def outputs_of(backbone: Backbone, batch: Any, received: Injection | None) -> Tensor:
    """What the head makes of a batch: [rows, outputs], or [rows, seq, outputs] where it reads each state.

    Raises:
        InputError: no head.
    """
    head = part_of(received, TaskHead)
    if head is None:
        raise InputError("prefix", expected="a task head", found="none", next_step="train one for this task")
    inputs = {name: tensor.to(backbone.device) for name, tensor in batch.inputs.items()}
    return read(head, layout.states(backbone, inputs, received), inputs.get("attention_mask"))


def scores_of(task: TaskRecord, examples: Sequence[Any], chosen: Sequence[list[int]]) -> dict[str, float]:
    """The metrics of `chosen`, the numbers that `answers` gives for each example."""
    right, ours = [example.answer for example in examples], named(task, examples, chosen)
    match task.answer:
        case "tags":
            return tagging_scores(ours, right)
        case "span":
            return answer_scores(ours, [[text for text, _ in texts] for texts in right])
        case "choice":
            return accuracy(ours, right)
        case _:
            return classification_scores(ours, right, list(task.labels or ()))


def main_score(task: TaskRecord, examples: Sequence[Any], chosen: Sequence[list[int]]) -> float:
    """The one metric by which two prefixes are compared: F1 of entities and of spans, otherwise accuracy."""
    return scores_of(task, examples, chosen)["f1" if task.answer in ("tags", "span") else "accuracy"]


def named(task: TaskRecord, examples: Sequence[Any], chosen: Sequence[list[int]]) -> list[Any]:
    """What `chosen` says: for each example a label, a tag for each word, the number of a choice, or a text."""
    pairs = list(zip(chosen, examples, strict=True))
    match task.answer:
        case "tags":
            return [_tags(task, row, len(example.answer)) for row, example in pairs]
        case "span":
            text = input_fields(task)[-1]
            return [example.fields[text][begin:end].strip() for (begin, end), example in pairs]
        case "choice":
            return [number for (number,), _ in pairs]
        case _:
            return [(task.labels or ())[number] for (number,), _ in pairs]


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
    """What the head chooses for each row, in numbers: of a label, of a label for each word that fit, of a choice, or
    the characters at which a span begins and ends."""
    chosen: dict[int, list[int]] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    received = backbone.fold(received) if received is not None else None
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate([rows[index] for index in indices])
        best = batch.best(batch.scores(outputs_of(backbone, batch, received)))
        chosen.update(zip(indices, best, strict=True))
        done(len(chosen))
    return [chosen[index] for index in range(len(rows))]
