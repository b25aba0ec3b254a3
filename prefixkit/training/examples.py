"""The data of a task, whatever it is: read, encoded, put into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefixkit.backbones.backbone import Backbone
from prefixkit.data.answered import COLLATE, encode_answered, read_answered
from prefixkit.data.batches import Collate, collate, collate_pairs, encode_examples
from prefixkit.data.images import collate_images, encode_images, read_images
from prefixkit.data.labelled import labels_in
from prefixkit.data.masked import collate_masked, encode_masked
from prefixkit.data.readers import read_examples
from prefixkit.errors import DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import ModelTokenizer, input_fields


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
