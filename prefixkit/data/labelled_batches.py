"""Labelled examples as token ids and numbers of labels, in padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixkit.data.batches import IGNORED, rectangle
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

    @property
    def target_tokens(self) -> int:
        """Labels that are learned."""
        return sum(label != IGNORED for label in self.labels)


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

    def scores(self, outputs: Tensor) -> Tensor:
        """The scores among which each label was chosen, in the last dimension, of the head's `outputs`."""
        return outputs

    def best(self, scores: Tensor) -> list[list[int]]:
        """The numbers that `scores` make best for each example: one, or one for each word."""
        best = scores.argmax(dim=-1).cpu().reshape(len(self.labels), -1)
        learned = (self.labels != IGNORED).reshape(len(self.labels), -1)
        return [row[known].tolist() for row, known in zip(best, learned, strict=True)]


def encode_label(task: TaskRecord, tokenizer: ModelTokenizer, example: LabelledExample) -> LabelledRow:
    """An example with one label. Raises DataError where it cannot be made to fit."""
    ids, lost = fit_prompt(task, tokenizer, example.fields, where=example.where)
    return LabelledRow(tuple(ids), ((task.labels or ()).index(example.answer),), lost)


def encode_tags(task: TaskRecord, tokenizer: ModelTokenizer, example: LabelledExample) -> LabelledRow:
    """An example with a tag for each word, which is learned at the word's first token. Raises DataError."""
    encoded = encode_words(task, tokenizer, example.fields["tokens"], where=example.where)
    labels = [IGNORED] * len(encoded.ids)
    for position, tag in zip(encoded.starts, example.answer, strict=False):
        labels[position] = (task.labels or ()).index(tag)
    if not encoded.starts:
        raise DataError(example.where, expected="a word that fits", found="none")
    return LabelledRow(tuple(encoded.ids), tuple(labels), encoded.lost)


def collate_labels(rows: Sequence[LabelledRow]) -> LabelledBatch:
    """One batch of `rows` in order, of one label each."""
    return LabelledBatch(padded([row.ids for row in rows]), torch.tensor([row.labels[0] for row in rows]))


def collate_tags(rows: Sequence[LabelledRow]) -> LabelledBatch:
    """One batch of `rows` in order, of a label a token."""
    return LabelledBatch(padded([row.ids for row in rows]), rectangle([row.labels for row in rows], IGNORED)[0])


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of token ids, padded on the right."""
    input_ids, mask = rectangle(rows, 0)
    return {"input_ids": input_ids, "attention_mask": mask}
