"""Validation on the way: the loss of held-out examples, and the best parameters so far."""

from __future__ import annotations

from typing import Any

import torch

from prefixkit.backbones.backbone import Backbone
from prefixkit.data.batches import Collate, in_order
from prefixkit.injections import Injection
from prefixkit.training.checkpoint import State
from prefixkit.training.objectives import Objective
from prefixkit.training.preparation import Prepared
from prefixkit.training.processes import ALONE, Group
from prefixkit.training.progress import Listener, Validation
from prefixkit.training.reading import answers, main_score

_LARGER = 2
"""Validation needs no gradients: batches this many times larger."""


@torch.no_grad()
def mean_loss(
    backbone: Backbone,
    examples: list[Any],
    prefix: Injection | None,
    batch_size: int,
    objective: Objective,
    collate: Collate,
    group: Group = ALONE,
) -> float:
    """Nats a target token, or a label, over `examples`, of which each process of `group` computes its share."""
    total, tokens = 0.0, 0
    for own, counts in in_order(examples, batch_size=batch_size, collate=group.share):
        batch = collate(own)
        total += objective(backbone, batch, prefix).item() * counts
        tokens += batch.target_tokens * counts
    total, seen = group.summed(total, tokens)
    return total / seen


def validate(prepared: Prepared, state: State, listener: Listener) -> None:
    """Measure the validation and remember the parameters if they are the best so far."""
    if prepared.validation:
        _measure(prepared, state, listener)
    state.validated = state.step


def _measure(prepared: Prepared, state: State, listener: Listener) -> None:
    size = prepared.config.batch_size * _LARGER
    received = prepared.backbone.fold(prepared.method.fold())
    objective, collate = prepared.objective, prepared.batches.collate
    loss = mean_loss(prepared.backbone, prepared.validation, received, size, objective, collate, prepared.group)
    score = _score(prepared, received, size)
    best = (-(score or 0.0), loss) < (-state.best_score, state.best_loss)
    if best:
        state.best_loss, state.best_score, state.best_step, state.stale = loss, score or 0.0, state.step, 0
        state.best = {name: tensor.clone() for name, tensor in prepared.method.state_dict().items()}
    else:
        state.stale += 1
    listener.on_validation(Validation(step=state.step, loss=loss, best=best, score=score))


def _score(prepared: Prepared, received: Injection, batch_size: int) -> float | None:
    """The accuracy or F1 on the validation data, where that decides which validation is best."""
    if prepared.config.evaluation.metric != "score":
        return None
    rows, collate = prepared.validation, prepared.batches.collate
    chosen = answers(prepared.backbone, rows, received, collate, batch_size=batch_size)
    return prepared.group.of_first(main_score(prepared.task, prepared.held_out, chosen))
