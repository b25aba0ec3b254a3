"""The data of a task, whatever it is: read, encoded, put into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from prefixkit.backbones.backbone import Backbone
from prefixkit.data.answered import COLLATE, encode_answered, read_answered
from prefixkit.data.batches import Collate, collate, collate_pairs, encode_examples
from prefixkit.data.images import collate_images, encode_images, read_images
from prefixkit.data.labelled import labels_in
from prefixkit.data.masked import collate_masked, encode_masked
from prefixkit.data.readers import data_hash, read_examples
from prefixkit.errors import DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import ModelTokenizer, input_fields

Made = TypeVar("Made")


class Data:
    """Data that is read and encoded once, for however many runs of one backbone want it."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Any] = {}
        self._examples: list[Any] = []

    def read(self, path: str, task: TaskRecord, limit: int | None = None) -> list[Any]:
        """The examples of a file, or at most `limit` of them, evenly through it. Raises DataError."""

        def make() -> list[Any]:
            examples = read(path, task)
            # The references of one input often stand together.
            chosen = examples if limit is None else examples[:: -(-len(examples) // limit)]
            # Below, a list stands for its contents: none may be forgotten, and its place taken by another.
            self._examples.append(chosen)
            return chosen

        return self._once("read", f"{path} {limit} {task}", make)

    def encode(
        self, task: TaskRecord, tokenizer: ModelTokenizer | None, backbone: Backbone, examples: Sequence[Any]
    ) -> list[Any]:
        """Each of `examples`, which `read` gave, as numbers. Raises DataError."""
        return self._once("encode", f"{id(examples)} {task}", lambda: encode(task, tokenizer, backbone, examples))

    def hash(self, examples: Sequence[Any]) -> str:
        """The `data_hash` of `examples`, which `read` gave."""
        return self._once("hash", str(id(examples)), lambda: data_hash(examples))

    def _once(self, what: str, key: str, make: Callable[[], Made]) -> Made:
        if (what, key) not in self._known:
            self._known[what, key] = make()
        made: Made = self._known[what, key]
        return made


def read(path: str | Path, task: TaskRecord) -> list[Any]:
    """The examples of a file, or of a folder of images, as the task wants them. Raises DataError."""
    if task.image is not None:
        return read_images(path)
    if task.answer is not None:
        return read_answered(path, task)
    return read_examples(path, fields=input_fields(task), verbalizer=task.verbalizer)


def with_labels(task: TaskRecord, examples: Sequence[Any], path: str | Path) -> TaskRecord:
    """`task` with the labels that occur in `examples`, where it is answered with labels that nobody named.

    Raises:
        DataError: a single one.
    """
    if task.answer not in ("label", "tags") or task.labels is not None:
        return task
    labels = labels_in(examples)
    if len(labels) < 2:
        raise DataError(path, expected="at least two different labels", found=", ".join(labels) or "none")
    return replace(task, labels=labels)


def encode(
    task: TaskRecord, tokenizer: ModelTokenizer | None, backbone: Backbone, examples: Sequence[Any]
) -> list[Any]:
    """Each example as numbers. Raises DataError, at the example's line, where one cannot be made to fit."""
    if task.image is not None:
        return list(encode_images(task, examples))
    assert tokenizer is not None
    if task.answer is not None:
        return list(encode_answered(task, tokenizer, examples))
    if backbone.kind == "encoder":
        return list(encode_masked(task, tokenizer, examples))
    return list(encode_examples(task, tokenizer, examples))


def collate_for(task: TaskRecord, backbone: Backbone) -> Collate:
    """What makes one batch of encoded examples."""
    if task.image is not None:
        return collate_images
    if task.answer is not None:
        return COLLATE[task.answer]
    if backbone.kind == "encoder":
        return collate_masked
    return collate_pairs if backbone.paired else collate
