"""Examples that a head answers, whatever the answer is: read from JSONL, one object a line, encoded, put into batches.

The shapes of a line are in `labelled`, `choices` and `spans`, one file an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.data.batches import Collate
from prefixkit.data.choices import collate_choices, encode_choice, parse_choice
from prefixkit.data.labelled import LabelledExample, check_labels, parse_label, parse_tags
from prefixkit.data.labelled_batches import collate_labels, collate_tags, encode_label, encode_tags
from prefixkit.data.readers import lines_of, object_in
from prefixkit.data.spans import collate_spans, encode_span, parse_span
from prefixkit.errors import DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import ModelTokenizer, input_fields


@dataclass(frozen=True)
class _Shape:
    """How the examples of one kind of answer are read, encoded and put into batches."""

    parse: Callable[[Mapping[str, Any], str, Sequence[str]], LabelledExample]
    encode: Callable[[TaskRecord, ModelTokenizer, LabelledExample], Any]
    collate: Collate


_SHAPES: Mapping[str, _Shape] = {
    "label": _Shape(parse_label, encode_label, collate_labels),
    "tags": _Shape(parse_tags, encode_tags, collate_tags),
    "choice": _Shape(parse_choice, encode_choice, collate_choices),
    "span": _Shape(parse_span, encode_span, collate_spans),
}
COLLATE: Mapping[str, Collate] = {answer: shape.collate for answer, shape in _SHAPES.items()}
"""By the answer of a task."""


def read_answered(path: str | Path, task: TaskRecord) -> list[LabelledExample]:
    """The examples of a file, in order.

    Raises DataError, which names the line, for a missing, empty or malformed file, or a label that the task has not.
    """
    parse, wanted = _SHAPES[task.answer or "label"].parse, input_fields(task)
    lines = ((line, f"{path}:{number}") for number, line in lines_of(Path(path)))
    examples = [parse(object_in(line, where), where, wanted) for line, where in lines]
    if not examples:
        raise DataError(path, expected="at least one example", found="an empty file", next_step="write one a line")
    for example in examples if task.labels is not None else ():
        check_labels(example, task.labels or ())
    return examples


def encode_answered(task: TaskRecord, tokenizer: ModelTokenizer, examples: Iterable[LabelledExample]) -> list[Any]:
    """Each example as the task says. Raises DataError, at the example's line, where one cannot be made to fit."""
    encode = _SHAPES[task.answer or "label"].encode
    return [encode(task, tokenizer, example) for example in examples]
