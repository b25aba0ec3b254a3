"""What a head says of texts and of images, as the usage contract asks: by onnxruntime and numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefixkit.errors import ConfigError, DataError
from prefixkit.format.manifest import ImageRecord, TaskRecord
from prefixkit.serving.prefix_table import Array
from prefixkit.serving.reader import Reader
from prefixkit.task import Fields, ModelTokenizer, encode_prompt, encode_words, load_tokenizer


def labels_of(reader: Reader, inputs: Sequence[Fields] | Array) -> list[str]:
    """The label of each input of a classification.

    Args:
        inputs: the task's fields by name; or images, uint8 [batch, height, width, channels], of the task's size.

    Raises:
        InputError: a folder whose file answers otherwise, or inputs that do not fit its task.
    """
    task = _task(reader, "label")
    rows = _pixels(inputs, task.image) if isinstance(inputs, np.ndarray) else _ids(reader, task, inputs)
    logits = reader.read(rows, [reader.own] * len(inputs)).logits
    assert logits is not None
    return _named(task, logits)


def tags_of(reader: Reader, texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """The tag of each word of each text; of a text that is too long, of the words that fit.

    Raises:
        InputError: a folder whose file answers otherwise, or words that its tokenizer does not know.
    """
    task, tokenizer = _task(reader, "tags"), load_tokenizer(reader.report.folder)
    rows = [encode_words(task, tokenizer, words, where=f"text {number}") for number, words in enumerate(texts, start=1)]
    logits = reader.read([row.ids for row in rows], [reader.own] * len(rows)).logits
    assert logits is not None
    return [_named(task, logits[index, list(row.starts)]) for index, row in enumerate(rows)]


def _task(reader: Reader, answer: str) -> TaskRecord:
    task = reader.own.task if reader.own is not None else None
    if task is None or task.answer != answer or task.labels is None:
        found = "no task" if task is None else f"one with the answer {task.answer}"
        expected, step = f"a task with the answer {answer}", "`prefixkit eval` answers every task"
        raise ConfigError(str(reader.report.folder), expected=expected, found=found, next_step=step)
    return task


def _ids(reader: Reader, task: TaskRecord, inputs: Sequence[Fields]) -> list[list[int]]:
    tokenizer: ModelTokenizer = load_tokenizer(reader.report.folder)
    return [
        encode_prompt(task, tokenizer, fields, where=f"input {number}") for number, fields in enumerate(inputs, start=1)
    ]


def _pixels(images: Array, record: ImageRecord | None) -> Array:
    """[batch, channels, height, width]: divided by 255, minus the mean, divided by the deviation."""
    shape = None if record is None else (record.height, record.width, record.channels)
    if record is None or images.dtype != np.uint8 or images.shape[1:] != shape:
        expected, found = f"uint8 images {shape}" if shape else "texts", f"{images.dtype} {images.shape[1:]}"
        raise DataError("images", expected=expected, found=found, next_step="resize them first")
    mean, std = (np.array(numbers, dtype=np.float32) for numbers in (record.mean, record.std))
    scaled = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _named(task: TaskRecord, logits: Array) -> list[str]:
    assert task.labels is not None
    return [task.labels[best] for best in logits.argmax(axis=-1)]
