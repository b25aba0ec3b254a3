"""Examples that a head answers, from JSONL files, one object a line.

{"text": "…", "label": "positive"}                   a label; fields are the ones that the task's template names
{"tokens": ["Blue", "Spice"], "tags": ["B", "I"]}    a tag for each word
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixkit.data.readers import lines_of, object_in, quoted, text_in
from prefixkit.errors import DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.spelling import did_you_mean
from prefixkit.task import input_fields


@dataclass(frozen=True)
class LabelledExample:
    """One input and what a head should answer."""

    fields: Mapping[str, Any]
    """Texts by the names of the template's fields; `tokens` are words."""
    answer: Any
    """A label, or a tag for each word."""
    where: str = field(default="example", compare=False)
    """File and line, for messages about it."""


def read_labelled(path: str | Path, task: TaskRecord) -> list[LabelledExample]:
    """The examples of a file, in order.

    Raises DataError, which names the line, for a missing, empty or malformed file, or a label that the task has not.
    """
    parse = _PARSERS[task.answer or "label"]
    wanted = input_fields(task)
    examples = [_parsed(parse, line, f"{path}:{number}", wanted) for number, line in lines_of(Path(path))]
    if not examples:
        raise DataError(path, expected="at least one example", found="an empty file", next_step="write one a line")
    for example in examples if task.labels is not None else ():
        _check_labels(example, task.labels or ())
    return examples


def labels_in(examples: Sequence[LabelledExample]) -> tuple[str, ...]:
    """The labels that occur, sorted; `O`, which tags what is nothing, comes first."""
    found = {label for example in examples for label in _labels(example)}
    return tuple(sorted(found, key=lambda label: (label != "O", label)))


def _labels(example: LabelledExample) -> tuple[str, ...]:
    return (example.answer,) if isinstance(example.answer, str) else tuple(example.answer)


def _check_labels(example: LabelledExample, known: Sequence[str]) -> None:
    for label in _labels(example):
        if label not in known:
            expected = f"one of the labels {', '.join(known)}"
            raise DataError(example.where, expected=expected, found=quoted(label), next_step=did_you_mean(label, known))


def _parsed(parse: Parser, line: str, where: str, wanted: Sequence[str]) -> LabelledExample:
    return parse(object_in(line, where), where, wanted)


def _label(record: Mapping[str, Any], where: str, wanted: Sequence[str]) -> LabelledExample:
    label = record.get("label")
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label):
        raise DataError(where, expected="'label' as text or a whole number", found=quoted(str(label)))
    return LabelledExample({name: text_in(record, name, where) for name in wanted}, str(label), where)


def _tags(record: Mapping[str, Any], where: str, wanted: Sequence[str]) -> LabelledExample:
    words, tags = (_texts(record, name, where) for name in ("tokens", "tags"))
    if len(words) != len(tags):
        raise DataError(where, expected=f"a tag for each of {len(words)} tokens", found=f"{len(tags)} tags")
    return LabelledExample({"tokens": words}, tags, where)


def _texts(record: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    texts = record.get(name)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(where, expected=f"{name!r} as a list of texts", found=quoted(str(texts)))
    return tuple(texts)


Parser = Callable[[Mapping[str, Any], str, Sequence[str]], LabelledExample]
_PARSERS: Mapping[str, Parser] = {"label": _label, "tags": _tags}
