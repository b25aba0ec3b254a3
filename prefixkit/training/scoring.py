"""The score of a prefix on its task: of what it writes, of the labels it makes likeliest, of what its head says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prefixkit.backbones.backbone import Backbone
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import Injection
from prefixkit.task import ModelTokenizer
from prefixkit.training import evaluation
from prefixkit.training.classification import chosen, label_scores
from prefixkit.training.cloze import mixed, ranks, word_scores
from prefixkit.training.examples import collate_for, encode, read
from prefixkit.training.metrics.classification import classification_scores
from prefixkit.training.metrics.ranking import ranking_scores
from prefixkit.training.objectives import Objective, next_token
from prefixkit.training.reading import answer_loss, answers, named, scores_of
from prefixkit.training.validation import mean_loss

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""What shows how far work of a name and a size has come."""


@dataclass(frozen=True)
class Score:
    """What was scored, and how it came out.

    Attributes:
        inputs, references: how many.
        records: one an input, to be written as JSON Lines.
    """

    inputs: int
    references: int
    metrics: dict[str, float]
    records: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How to score.

    Attributes:
        limit: only the first inputs.
        batch_size: inputs at a time.
        num_beams: 1 is greedy.
    """

    progress: Progress
    limit: int | None = None
    batch_size: int = 32
    num_beams: int = 1
    max_new_tokens: int = 100


def score(
    model: Backbone,
    task: TaskRecord,
    tokenizer: ModelTokenizer | None,
    data: str,
    received: Sequence[Injection | None],
    how: Scoring,
) -> Score:
    """The score of one prefix, or of the majority of several, on the examples in `data`.

    Raises:
        DataError: unreadable or unfitting examples.
    """
    if task.answer is not None:
        return _answered(model, task, tokenizer, read(data, task)[: how.limit], received[0], how)
    assert tokenizer is not None
    groups = evaluation.grouped(read(data, task), how.limit)
    folded = [None if one is None else model.fold(one) for one in received]
    for one in folded:
        task = evaluation.within_context(task, model, one)
    examples = evaluation.ungrouped(groups)
    if task.verbalizer is None and model.kind == "encoder":
        records, metrics = _ranked(model, [task], tokenizer, examples, folded, [1.0], how)
    elif task.verbalizer is not None:
        records, metrics = _labelled(model, task, tokenizer, examples, folded, how)
    else:
        records, metrics = _written(model, task, tokenizer, groups, folded[0], how)
    rows = encode(task, tokenizer, model, examples)
    losses = [_loss(model, task, rows, one, next_token, how) for one in folded]
    return Score(len(groups), len(examples), {"loss": sum(losses) / len(losses), **metrics}, records)


def score_mixture(
    model: Backbone,
    tasks: Sequence[TaskRecord],
    tokenizer: ModelTokenizer,
    data: str,
    received: Sequence[Injection],
    weights: Sequence[float],
    how: Scoring,
) -> Score:
    """The score of a mixture: each pattern's probabilities by its weight (`prefixkit.training.mixture`).

    Raises:
        DataError: unreadable or unfitting examples.
    """
    examples = read(data, tasks[0])[: how.limit]
    shares = [weight / sum(weights) for weight in weights]
    if tasks[0].verbalizer is None:
        records, metrics = _ranked(model, tasks, tokenizer, examples, received, shares, how)
        return Score(len(examples), len(examples), metrics, records)
    scores = [
        _label_scores(model, task, tokenizer, examples, one, how) for task, one in zip(tasks, received, strict=True)
    ]
    records, metrics = _chosen(tasks[0], examples, [mixed(scores, shares)])
    return Score(len(examples), len(examples), metrics, records)


def _ranked(
    model: Backbone,
    tasks: Sequence[TaskRecord],
    tokenizer: ModelTokenizer,
    examples: list[Any],
    received: Sequence[Injection | None],
    weights: Sequence[float],
    how: Scoring,
) -> tuple[list[Any], dict[str, float]]:
    scores = []
    for task, one in zip(tasks, received, strict=True):
        with how.progress("reading", len(examples)) as done:
            found = word_scores(model, task, tokenizer, examples, one, batch_size=how.batch_size, done=done)
        scores.append(found)
    whole = mixed(scores, weights)
    places = ranks(tasks[0], tokenizer, examples, whole)
    best = [tokenizer.decode([word]) for word in whole.argmax(dim=1).tolist()]
    told = zip(examples, best, places, strict=True)
    records = [{**one.fields, "target": one.target, "written": word, "rank": place} for one, word, place in told]
    return records, ranking_scores(places)


def _label_scores(
    model: Backbone,
    task: TaskRecord,
    tokenizer: ModelTokenizer,
    examples: list[Any],
    received: Injection | None,
    how: Scoring,
) -> Tensor:
    with how.progress("choosing", len(examples) * len(task.verbalizer or {})) as done:
        return label_scores(model, task, tokenizer, examples, received, batch_size=how.batch_size, done=done)


def _loss(
    model: Backbone, task: TaskRecord, rows: list[Any], received: Injection | None, objective: Objective, how: Scoring
) -> float:
    return mean_loss(model, rows, received, how.batch_size, objective, collate_for(task, model))


def _answered(
    model: Backbone,
    task: TaskRecord,
    tokenizer: ModelTokenizer | None,
    examples: list[Any],
    received: Injection | None,
    how: Scoring,
) -> Score:
    rows, collate = encode(task, tokenizer, model, examples), collate_for(task, model)
    with how.progress("reading", len(rows)) as done:
        numbers = answers(model, rows, received, collate, batch_size=how.batch_size, done=done)
    told = zip(examples, named(task, examples, numbers), strict=True)
    records = [{"where": one.where, "answer": one.answer, "chosen": choice} for one, choice in told]
    loss = _loss(model, task, rows, received, answer_loss, how)
    return Score(len(rows), len(rows), {"loss": loss, **scores_of(task, examples, numbers)}, records)


def _written(
    model: Backbone, task: TaskRecord, tokenizer: ModelTokenizer, groups: Any, received: Injection | None, how: Scoring
) -> tuple[list[Any], dict[str, float]]:
    with how.progress("writing", len(groups)) as done:
        written = evaluation.write(
            model,
            task,
            tokenizer,
            groups,
            received,
            num_beams=how.num_beams,
            max_new_tokens=how.max_new_tokens,
            batch_size=how.batch_size,
            done=done,
        )
    records = [{**one.group.fields, "written": one.text, "references": one.group.references} for one in written]
    return records, evaluation.scores(written)


def _labelled(
    model: Backbone,
    task: TaskRecord,
    tokenizer: ModelTokenizer,
    examples: list[Any],
    received: Sequence[Injection | None],
    how: Scoring,
) -> tuple[list[Any], dict[str, float]]:
    return _chosen(task, examples, [_label_scores(model, task, tokenizer, examples, one, how) for one in received])


def _chosen(task: TaskRecord, examples: list[Any], scores: Sequence[Tensor]) -> tuple[list[Any], dict[str, float]]:
    assert task.verbalizer is not None
    labels = {word: label for label, word in task.verbalizer.items()}
    choices = chosen(task, scores)
    right = [labels[example.target] for example in examples]
    pairs = zip(examples, right, choices, strict=True)
    records = [{**example.fields, "label": label, "chosen": choice} for example, label, choice in pairs]
    return records, classification_scores(choices, right, list(task.verbalizer))
