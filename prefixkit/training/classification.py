"""Choosing a label: the one whose word the model finds likeliest after the input (Schick & Schuetze 2021, PET)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.backbone import Backbone
from prefixkit.data.batches import IGNORED, Batch, EncodedExample
from prefixkit.data.masked import encode_masked
from prefixkit.data.readers import Example
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import Injection
from prefixkit.task import ModelTokenizer, encode_prompt, encode_target
from prefixkit.training import layout
from prefixkit.training.examples import collate_for


def chosen(task: TaskRecord, scores: Sequence[Tensor]) -> list[str]:
    """The label that most of several prefixes choose for each example, as prompts are ensembled by Lester et al. 2021.

    Args:
        scores: one [examples, labels] a prefix, from `label_scores`. Where as many choose one label as another, the one
            with the larger likelihood over all prefixes is taken.
    """
    labels = list(task.verbalizer or ())
    votes = sum(F.one_hot(each.argmax(dim=1), len(labels)) for each in scores)
    likelihood = torch.softmax(torch.stack(list(scores)).sum(dim=0), dim=1)
    return [labels[best] for best in (votes + 0.5 * likelihood).argmax(dim=1).tolist()]


@torch.no_grad()
def label_scores(
    backbone: Backbone,
    task: TaskRecord,
    tokenizer: ModelTokenizer,
    examples: Sequence[Example],
    received: Injection | None,
    *,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """[examples, labels]: the log-likelihood in nats of each label's word and the stop token behind it.

    `done` hears how many continuations were scored, labels times examples in all.

    Raises:
        DataError: an input that cannot be made to fit.
    """
    assert task.verbalizer is not None
    words = list(task.verbalizer.values())
    # A masked language model puts each word into the prompt itself.
    rows = (_masked if backbone.kind == "encoder" else _continued)(task, tokenizer, examples, words)
    collate = collate_for(task, backbone)
    received = backbone.fold(received) if received is not None else None
    scores = torch.empty(len(rows))
    for count, indices in _by_length(rows, batch_size):
        scores[indices] = log_likelihoods(backbone, collate([rows[index] for index in indices]), received)
        done(count)
    return scores.reshape(len(examples), len(words))


def _continued(
    task: TaskRecord, tokenizer: ModelTokenizer, examples: Sequence[Example], words: Sequence[str]
) -> list[Any]:
    """A row for each example and word, which stands behind the prompt."""
    targets = [tuple(encode_target(task, tokenizer, word)) for word in words]
    room = max(map(len, targets))
    rows: list[EncodedExample] = []
    for example in examples:
        prompt = tuple(encode_prompt(task, tokenizer, example.fields, room=room, where=example.where))
        rows += [EncodedExample(prompt, target) for target in targets]
    return rows


def _masked(
    task: TaskRecord, tokenizer: ModelTokenizer, examples: Sequence[Example], words: Sequence[str]
) -> list[Any]:
    """A row for each example and word, which is learned at the mask."""
    asked = [Example(example.fields, word, example.where) for example in examples for word in words]
    return list(encode_masked(task, tokenizer, asked))


def _by_length(rows: Sequence[Any], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield start + len(chosen), chosen


def log_likelihoods(backbone: Backbone, batch: Batch, received: Injection | None) -> Tensor:
    """[batch]: the summed log-likelihood of each example's target."""
    batch = batch.to(backbone.device)
    laid = layout.laid(backbone, batch, received)
    logits = backbone.target_logits(batch.input_ids, batch.attention_mask, batch.labels, laid)
    chosen = batch.labels != IGNORED
    each = -F.cross_entropy(logits.float(), batch.labels[chosen], reduction="none")
    number = layout.owners(batch, torch.arange(batch.examples, device=each.device))[chosen]
    return torch.zeros(batch.examples, device=each.device).index_add(0, number, each).cpu()
