"""Examples that a head answers, as token ids and label numbers, in padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixkit.data.batches import IGNORED, Collate, rectangle
from prefixkit.data.labelled import LabelledExample
from prefixkit.errors import DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import ModelTokenizer, encode_words, fit_prompt


@dataclass(frozen=True)
class LabelledRow:
    """Token ids of one example, and the numbers of its labels: one, or one a token, -100 where nothing is learned."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: int = 0
    """Tokens that the input lost to fit."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def words(self) -> list[int]:
        """All its tokens."""
        return list(self.ids)


@dataclass(frozen=True)
class LabelledBatch:
    """What a backbone reads, and what its head should answer.

    Attributes:
        inputs: `input_ids` and `attention_mask`, int64 [B, T].
        labels: int64, [B], or [B, T] for a tag at each word's first token; -100 where nothing is learned.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.inputs["attention_mask"].sum())

    @property
    def target_tokens(self) -> int:
        """Labels that are learned."""
        return int((self.labels != IGNORED).sum())

    @property
    def examples(self) -> int:
        """Examples."""
        return len(self.labels)


def encode_labelled(
    task: TaskRecord, tokenizer: ModelTokenizer, examples: Iterable[LabelledExample]
) -> list[LabelledRow]:
    """Each example as the task says. Raises DataError, at the example's line, where one cannot be made to fit."""
    encode = _tagged if task.answer == "tags" else _classified
    number = {label: index for index, label in enumerate(task.labels or ())}
    return [encode(task, tokenizer, example, number) for example in examples]


def _classified(
    task: TaskRecord, tokenizer: ModelTokenizer, example: LabelledExample, number: Mapping[str, int]
) -> LabelledRow:
    ids, lost = fit_prompt(task, tokenizer, example.fields, where=example.where)
    return LabelledRow(tuple(ids), (number[example.answer],), lost)


def _tagged(
    task: TaskRecord, tokenizer: ModelTokenizer, example: LabelledExample, number: Mapping[str, int]
) -> LabelledRow:
    encoded = encode_words(task, tokenizer, example.fields["tokens"], where=example.where)
    labels = [IGNORED] * len(encoded.ids)
    for position, tag in zip(encoded.starts, example.answer, strict=False):
        labels[position] = number[tag]
    if not encoded.starts:
        raise DataError(example.where, expected="a word that fits", found="none")
    return LabelledRow(tuple(encoded.ids), tuple(labels), encoded.lost)


def collate_labels(rows: Sequence[LabelledRow]) -> LabelledBatch:
    """One batch of `rows` in order, of one label each."""
    return LabelledBatch(_inputs(rows), torch.tensor([row.labels[0] for row in rows]))


def collate_tags(rows: Sequence[LabelledRow]) -> LabelledBatch:
    """One batch of `rows` in order, of a label a token."""
    return LabelledBatch(_inputs(rows), rectangle([row.labels for row in rows], IGNORED)[0])


def _inputs(rows: Sequence[LabelledRow]) -> dict[str, Tensor]:
    input_ids, mask = rectangle([row.ids for row in rows], 0)
    return {"input_ids": input_ids, "attention_mask": mask}


COLLATE: Mapping[str, Collate] = {"label": collate_labels, "tags": collate_tags}
"""By the answer of a task."""
