"""Examples that a head answers with labels: one for the whole input, or one for each word.

{"text": "…", "label": "positive"}                   a label; fields are the ones that the task's template names
{"tokens": ["Blue", "Spice"], "tags": ["B", "I"]}    a tag for each word
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixkit.data.readers import quoted, text_in
from prefixkit.errors import DataError
from prefixkit.spelling import did_you_mean


@dataclass(frozen=True)
class LabelledExample:
    """One input and what a head should answer."""

    fields: Mapping[str, Any]
    """Texts by the names of the template's fields; `tokens` and `choices` are several."""
    answer: Any
    """A label, a tag for each word, the number of a choice, or texts with the characters at which they begin."""
    where: str = field(default="example", compare=False)
    """File and line, for messages about it."""


def labels_in(examples: Sequence[LabelledExample]) -> tuple[str, ...]:
    """The labels that occur, sorted; `O`, which tags what is nothing, comes first."""
    found = {label for example in examples for label in _labels(example)}
    return tuple(sorted(found, key=lambda label: (label != "O", label)))


def _labels(example: LabelledExample) -> tuple[str, ...]:
    return (example.answer,) if isinstance(example.answer, str) else tuple(example.answer)


def check_labels(example: LabelledExample, known: Sequence[str]) -> None:
    """Raise DataError for a label that is not one of `known`."""
    for label in _labels(example):
        if label not in known:
            expected = f"one of the labels {', '.join(known)}"
            raise DataError(example.where, expected=expected, found=quoted(label), next_step=did_you_mean(label, known))


def parse_label(record: Mapping[str, Any], where: str, wanted: Sequence[str]) -> LabelledExample:
    """The texts `wanted` and their label. Raises DataError."""
    label = record.get("label")
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label):
        raise DataError(where, expected="'label' as text or a whole number", found=quoted(str(label)))
    return LabelledExample({name: text_in(record, name, where) for name in wanted}, str(label), where)


def parse_tags(record: Mapping[str, Any], where: str, wanted: Sequence[str]) -> LabelledExample:
    """Words and their tags. Raises DataError."""
    words, tags = (texts_in(record, name, where) for name in ("tokens", "tags"))
    if len(words) != len(tags):
        raise DataError(where, expected=f"a tag for each of {len(words)} tokens", found=f"{len(tags)} tags")
    return LabelledExample({"tokens": words}, tags, where)


def texts_in(record: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """The list of texts called `name` in `record`. Raises DataError."""
    texts = record.get(name)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(where, expected=f"{name!r} as a list of texts", found=quoted(str(texts)))
    return tuple(texts)
