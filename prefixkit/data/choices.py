"""Multiple choice: the input is read once with each choice, and the head scores each reading.

{"text": "The sky is", "choices": ["blue", "loud", "under it"], "label": 0}

`label` counts from 0. Fields beside `choices` are the ones that the task's template names; examples may have different
numbers of choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefixkit.data.labelled import LabelledExample, texts_in
from prefixkit.data.labelled_batches import LabelledBatch, padded
from prefixkit.data.readers import quoted, text_in
from prefixkit.errors import DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import CHOICE, ModelTokenizer, fit_choice

_CHOICES = "choices"


@dataclass(frozen=True)
class ChoiceRow:
    """The token ids of one example with each of its choices, and the number of the right one."""

    ids: tuple[tuple[int, ...], ...]
    label: int
    truncated: int = 0
    """Tokens that the input lost to fit, with the choice for which it lost most."""

    def __len__(self) -> int:
        return max(map(len, self.ids))

    @property
    def words(self) -> list[int]:
        """All tokens of the right reading."""
        return list(self.ids[self.label])


def parse_choice(record: Mapping[str, Any], where: str, wanted: Sequence[str]) -> LabelledExample:
    """The texts `wanted`, the choices and the number of the right one. Raises DataError."""
    choices, label = texts_in(record, _CHOICES, where), record.get("label")
    if len(choices) < 2:
        raise DataError(where, expected="two choices or more", found=str(len(choices)))
    if type(label) is not int or not 0 <= label < len(choices):
        expected = f"'label' from 0 to {len(choices) - 1}, the number of the right choice"
        raise DataError(where, expected=expected, found=quoted(str(label)))
    texts = {name: text_in(record, name, where) for name in wanted if name != CHOICE}
    return LabelledExample({**texts, _CHOICES: choices}, label, where)


def encode_choice(task: TaskRecord, tokenizer: ModelTokenizer, example: LabelledExample) -> ChoiceRow:
    """An example read with each of its choices. Raises DataError where one cannot be made to fit."""
    texts = {name: text for name, text in example.fields.items() if name != _CHOICES}
    fitted = [fit_choice(task, tokenizer, texts, one, where=example.where) for one in example.fields[_CHOICES]]
    return ChoiceRow(tuple(tuple(ids) for ids, _ in fitted), example.answer, max(lost for _, lost in fitted))


@dataclass(frozen=True)
class ChoiceBatch(LabelledBatch):
    """Examples with their choices: the rows of `inputs` are all choices of the first example, then of the second, …

    Attributes:
        labels: int64 [B], the number of the right choice.
        counts: how many choices each example has; their sum is the number of rows.
    """

    counts: tuple[int, ...]

    def scores(self, outputs: Tensor) -> Tensor:
        """[B, most choices] of `outputs` [rows, 1]; an example with fewer choices has minus infinity for the others."""
        each = torch.split(outputs[:, 0], list(self.counts))
        return pad_sequence(list(each), batch_first=True, padding_value=float("-inf"))


def collate_choices(rows: Sequence[ChoiceRow]) -> ChoiceBatch:
    """One batch of `rows` in order."""
    inputs = padded([ids for row in rows for ids in row.ids])
    return ChoiceBatch(inputs, torch.tensor([row.label for row in rows]), tuple(len(row.ids) for row in rows))
