"""Cloze examples for a masked language model: the target's tokens are learned where the prompt is masked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prefixkit.data.batches import IGNORED, Batch, rectangle
from prefixkit.data.labelled_batches import LabelledRow
from prefixkit.data.readers import Example
from prefixkit.errors import ConfigError, DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import ModelTokenizer, encode_target, fit_prompt


def encode_masked(task: TaskRecord, tokenizer: ModelTokenizer, examples: Iterable[Example]) -> list[LabelledRow]:
    """Each example as the task says: the ids of its prompt, and the target's tokens at the masks, -100 elsewhere.

    Raises:
        ConfigError: a task without a mask, or a tokenizer without one.
        DataError: another number of masks than the target has tokens, or an input that cannot be made to fit.
    """
    mask = tokenizer.named_id("mask_token")
    if mask is None or mask not in tokenizer.encode_marked([(task.input_template + task.separator, True)]):
        step = 'write {mask} into the task\'s input_template, such as "{cls}{text}{mask}"'
        found = "none" if mask is not None else "no mask token in the tokenizer"
        raise ConfigError(f"task {task.name}", expected="a mask for the word to write", found=found, next_step=step)
    return [_masked(task, tokenizer, example, mask) for example in examples]


def _masked(task: TaskRecord, tokenizer: ModelTokenizer, example: Example, mask: int) -> LabelledRow:
    ids, lost = fit_prompt(task, tokenizer, example.fields, where=example.where)
    target = encode_target(task, tokenizer, example.target, where=example.where)
    places = [index for index, token in enumerate(ids) if token == mask]
    if len(places) != len(target):
        expected = f"a target of {len(places)} token{'s' if len(places) > 1 else ''}, one a mask"
        raise DataError(example.where, expected=expected, found=f"{len(target)} in {example.target!r}")
    labels = [IGNORED] * len(ids)
    for place, token in zip(places, target, strict=True):
        labels[place] = token
    return LabelledRow(tuple(ids), tuple(labels), lost)


def collate_masked(rows: Sequence[LabelledRow]) -> Batch:
    """One batch of `rows` in order, padded on the right; `labels` stand at the masks."""
    input_ids, attention_mask = rectangle([row.ids for row in rows], 0)
    return Batch(input_ids, attention_mask, rectangle([row.labels for row in rows], IGNORED)[0])
