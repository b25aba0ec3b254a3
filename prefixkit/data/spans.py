"""Extractive question answering: the answer is a span of a text, as in SQuAD (Rajpurkar et al. 2016, 1606.05250).

{"question": "Where is it?", "context": "It is by the river.", "answer": {"text": "by the river", "start": 6}}

`start` counts characters from 0. `answer` may be a list: all of them count in evaluation, the first is learned. It is
null where the text does not answer the question; then the span is the first token, as in BERT's code for SQuAD 2. So it
is where the text was cut before the end of its answer: what is left does not answer the question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.data.batches import rectangle
from prefixkit.data.labelled import LabelledExample
from prefixkit.data.labelled_batches import LabelledBatch, padded
from prefixkit.data.readers import quoted, text_in
from prefixkit.errors import DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.spelling import did_you_mean
from prefixkit.task import ModelTokenizer, locate

LONGEST = 30
"""Tokens of an answer at most, as in BERT's code."""
_KEYS = '\'answer\' as {"text": …, "start": …}, a list of such, or null'


@dataclass(frozen=True)
class SpanRow:
    """Token ids, the first and last token of the answer, and the characters of the text that each token stands for."""

    ids: tuple[int, ...]
    span: tuple[int, int]
    places: tuple[tuple[int, int], ...]
    """Begin and end for each token; equal where the token is none of the text."""
    truncated: int = 0
    """Tokens that the input lost to fit."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def words(self) -> list[int]:
        """All its tokens."""
        return list(self.ids)


def parse_span(record: Mapping[str, Any], where: str, wanted: Sequence[str]) -> LabelledExample:
    """The texts `wanted` and the answers, (text, start) each, in the last of them. Raises DataError."""
    texts = {name: text_in(record, name, where) for name in wanted}
    if blank := [name for name, text in texts.items() if not text.strip()]:
        raise DataError(where, expected=f"some text as {blank[0]!r}", found=quoted(texts[blank[0]]))
    if "answer" not in record:
        found = ", ".join(map(repr, record))
        raise DataError(where, expected=_KEYS, found=found, next_step=did_you_mean("answer", record))
    given = record["answer"]
    several = given if isinstance(given, list) else [] if given is None else [given]
    text = texts[wanted[-1]]
    return LabelledExample(texts, tuple(_answer(one, text, where) for one in several), where)


def _answer(given: Any, text: str, where: str) -> tuple[str, int]:
    """One answer without white space around it."""
    said, start = (given.get("text"), given.get("start")) if isinstance(given, dict) else (None, None)
    if not isinstance(said, str) or not said.strip() or type(start) is not int:
        raise DataError(where, expected=_KEYS, found=quoted(str(given)))
    there = text[start : start + len(said)] if start >= 0 else ""
    if there != said:
        step = "count characters from 0 (a file of bytes counts otherwise)"
        raise DataError(where, expected=f"{quoted(said)} at character {start}", found=quoted(there), next_step=step)
    return said.strip(), start + len(said) - len(said.lstrip())


def encode_span(task: TaskRecord, tokenizer: ModelTokenizer, example: LabelledExample) -> SpanRow:
    """An example with the tokens of its first answer. Raises DataError where nothing of its text fits."""
    prompt = locate(task, tokenizer, example.fields, where=example.where)
    text, start = example.answer[0] if example.answer else ("", 0)
    end = start + len(text)
    touched = [index for index, (first, last) in enumerate(prompt.places) if first < end and start < last]
    cut_off = prompt.lost > 0 and max(last for _, last in prompt.places) < end
    span = (0, 0) if cut_off or not touched else (touched[0], touched[-1])
    return SpanRow(prompt.ids, span, prompt.places, prompt.lost)


@dataclass(frozen=True)
class SpanBatch(LabelledBatch):
    """Questions and texts.

    Attributes:
        labels: int64 [B, 2], the first and the last token of the answer.
        places: int64 [B, T, 2], the characters that each token stands for; equal where it is none of the text.
    """

    places: Tensor

    def scores(self, outputs: Tensor) -> Tensor:
        """[B, 2, T]: of each token as the first and as the last of the answer; minus infinity for what is no answer."""
        answers = self.places[..., 0] < self.places[..., 1]
        answers[:, 0] = True
        return outputs.transpose(1, 2).masked_fill(~answers[:, None].to(outputs.device), float("-inf"))

    def best(self, scores: Tensor) -> list[list[int]]:
        """The characters, begin and end, of the likeliest span of at most `LONGEST` tokens; 0 and 0 for no answer."""
        begins, ends = scores.float().cpu().unbind(dim=1)
        size = ends.shape[1]
        # [B, LONGEST, T]: the span that begins at a token and ends so many tokens behind it.
        later = F.pad(ends, (0, LONGEST - 1), value=float("-inf")).unfold(1, size, 1)
        spans = begins[:, None] + later
        # The first token says that there is no answer; it opens none.
        spans[:, 1:, 0] = float("-inf")
        best = spans.flatten(1).argmax(dim=1)
        first, last = best % size, best % size + best // size
        rows = range(len(best))
        characters = torch.stack([self.places[rows, first, 0], self.places[rows, last, 1]], dim=1)
        return characters.masked_fill((first == 0)[:, None], 0).tolist()


def collate_spans(rows: Sequence[SpanRow]) -> SpanBatch:
    """One batch of `rows` in order."""
    sides = [rectangle([[place[side] for place in row.places] for row in rows], 0)[0] for side in (0, 1)]
    labels = torch.tensor([row.span for row in rows])
    return SpanBatch(padded([row.ids for row in rows]), labels, torch.stack(sides, dim=2))
