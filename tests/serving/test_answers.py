"""What a head answers, by onnxruntime and numpy: the labels and tags that the backbone gives in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefixkit.backbones.heads import read
from prefixkit.data.images import prepared
from prefixkit.errors import ConfigError, DataError
from prefixkit.export.onnx import export_onnx
from prefixkit.injections import TaskHead, part_of
from prefixkit.serving.answers import labels_of, tags_of
from prefixkit.serving.reader import Reader
from prefixkit.task import encode_prompt, encode_words, load_tokenizer
from prefixkit.task.images import image_task
from tests.exported_readers import TASK, file_of, load_reading, received, retraced

TEXTS = ("roberta", "kv, head first")
WORDS = ("distilbert", "prompt prepend, head each")
IMAGES = ("vit", "prompt after_first, head first")


@torch.no_grad()
def test_labels_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retraced(monkeypatch, *TEXTS)
    model = load_reading("roberta")
    injection = received(model, TEXTS[1], seed=5)
    done = export_onnx(file_of(model, injection, TASK), model, tmp_path / "served")
    texts = ["blue spice", "the mill is near the river", "city", "eagle near city"]
    found = labels_of(Reader(done.folder), [{"text": text} for text in texts])
    assert found == [label_of(model, injection, text) for text in texts]
    assert len(set(found)) > 1
    with pytest.raises(ConfigError, match="a task with the answer tags; found one with the answer label"):
        tags_of(Reader(done.folder), [["blue", "spice"]])


def label_of(model: Any, injection: Any, text: str) -> str:
    ids = torch.tensor([encode_prompt(TASK, load_tokenizer(model.folder), {"text": text})])
    states = model.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, injection)
    head = part_of(injection, TaskHead)
    assert head is not None
    assert TASK.labels is not None
    return TASK.labels[int(read(head, states).argmax())]


@torch.no_grad()
def test_tags_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retraced(monkeypatch, *WORDS)
    model, task = load_reading("distilbert"), replace(TASK, answer="tags", input_template="<s>{tokens}")
    injection = received(model, WORDS[1])
    done = export_onnx(file_of(model, injection, task), model, tmp_path / "served")
    words = [["blue", "spice", "near"], ["river"]]
    found, expected = tags_of(Reader(done.folder), words), []
    for text in words:
        encoded = encode_words(task, load_tokenizer(model.folder), text, where="test")
        ids = torch.tensor([encoded.ids])
        states = model.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, injection)
        logits = read(part_of(injection, TaskHead), states)[0, list(encoded.starts)]  # type: ignore[arg-type]
        expected.append([TASK.labels[best] for best in logits.argmax(dim=-1)])  # type: ignore[index]
    assert found == expected
    assert [len(tags) for tags in found] == [3, 1]


@torch.no_grad()
def test_labels_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = retraced(monkeypatch, *IMAGES), load_reading("vit")
    task = replace(image_task(folder, 3), labels=TASK.labels)
    injection = received(model, IMAGES[1])
    reader = Reader(export_onnx(file_of(model, injection, task), model, tmp_path / "served").folder)
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    assert task.image is not None
    pixels = torch.stack([prepared(image, task.image) for image in images])
    logits = read(part_of(injection, TaskHead), model.states({"pixel_values": pixels}, injection))  # type: ignore[arg-type]
    assert labels_of(reader, images) == [TASK.labels[best] for best in logits.argmax(dim=-1)]  # type: ignore[index]
    with pytest.raises(DataError, match=r"uint8 images \(16, 16, 3\); found uint8 \(8, 8, 3\)"):
        labels_of(reader, images[:, :8, :8])
