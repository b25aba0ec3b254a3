"""The backbones of the matrix, one of each family, and what a method is asked to do on each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import DebertaV2Config, DebertaV2ForMaskedLM

from tests import encoder_decoders
from tests.architectures import VOCAB, tiny
from tests.conftest import WORDS
from tests.encoders import SPECIAL, encoder_folder
from tests.small_tokenizer import END, write_folder

SLOTTED = ("p-tuning", "optiprompt", "autoprompt", "soft-prompts")
"""On encoders these stand in slots of a cloze template."""
WRITING = ("capture", "cartridge")


@dataclass(frozen=True)
class Family:
    """One family: its kind, and what makes a folder of it."""

    kind: str
    folder: Callable[[Path], Path]


@dataclass(frozen=True)
class Cell:
    """One method on one family: the commands, and where things lie.

    Attributes:
        refused: the family is refused, whatever the method, or this method on it.
    """

    folder: Path
    output: Path
    train: list[str]
    evaluate: list[str]
    refused: bool


def _decoder(family: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        tiny(family).save_pretrained(path)
        return write_folder(path, tokenizer_config={"bos_token": END, "eos_token": END})

    return make


def _deberta(path: Path) -> Path:
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    DebertaV2ForMaskedLM(DebertaV2Config(vocab_size=VOCAB, **size)).save_pretrained(path)
    return write_folder(path, tokenizer_config=SPECIAL)


FAMILIES: dict[str, Family] = {
    **{name: Family("decoder", _decoder(name)) for name in ("gpt2", "llama")},
    **{
        name: Family("encoder", lambda path, name=name: encoder_folder(name, path))  # type: ignore[misc]
        for name in ("bert", "roberta", "electra", "distilbert", "modernbert")
    },
    "deberta-v2": Family("encoder", _deberta),
    **{
        name: Family("encoder-decoder", lambda path, name=name: encoder_decoders.folder_of(name, path))  # type: ignore[misc]
        for name in ("bart", "t5", "flan")
    },
    **{
        name: Family("vision", lambda path, name=name: encoder_folder(name, path))  # type: ignore[misc]
        for name in ("vit", "deit", "dinov2")
    },
}
REFUSED = ("deberta-v2",)
EXCEPTIONS = tuple((method, "electra") for method in ("prompt-tuning", *SLOTTED))
"""Its token vectors are narrower than its states."""


def cell_of(method: str, family: str, path: Path) -> Cell:
    """The cell of `method` and `family`, its backbone and data written below `path`."""
    kind, folder = FAMILIES[family].kind, FAMILIES[family].folder(path / "backbone")
    data, task = _data(method, kind, path)
    output = path / "made.safetensors"
    asked = ["--backbone", str(folder), "-o", str(output)]
    if method == "capture":
        (path / "context.txt").write_text("blue spice is near river .")
        train = ["capture", "--text", str(path / "context.txt"), *asked]
    else:
        train = ["train", "--method", method, "--data", str(data), "--task", task, "--steps", "10", *asked]
        train += _settings(method, family, path)
    evaluate = ["eval", str(output), "--backbone", str(folder), "--data", str(data), "--limit", "4"]
    if kind in ("decoder", "encoder-decoder"):
        evaluate += ["--max-new-tokens", "3"]
    return Cell(folder, output, train, evaluate, family in REFUSED or (method, family) in EXCEPTIONS)


def _settings(method: str, family: str, path: Path) -> list[str]:
    kind = FAMILIES[family].kind
    if method == "cartridge":
        (path / "document.txt").write_text("blue spice is near river .\nmill is near city .\n")
        return ["--length", "4", "--set", f"method.document={path / 'document.txt'}"]
    if method == "bitfit" and family in ("llama", "modernbert"):
        # They have no bias, but for a head over words.
        return ["--set", "method.parameters=layernorm"]
    slotted = method == "optiprompt" or (kind == "encoder" and method in SLOTTED)
    takes_places = method not in ("bitfit", "linear-probe") and not slotted
    return ["--length", "4"] if takes_places else []


def _data(method: str, kind: str, path: Path) -> tuple[Path, str]:
    """The data, and the task that it is for."""
    if kind == "vision":
        return _images(path / "images.npz"), "images"
    if kind == "encoder" and method in SLOTTED:
        return _labelled(path / "data.jsonl"), str(_cloze(path / "cloze.toml"))
    if method == "optiprompt":
        return _pairs(path / "data.jsonl"), str(_infix(path / "infix.toml"))
    if kind == "encoder" or method in ("p-tuning-v2", "linear-probe"):
        return _labelled(path / "data.jsonl"), "classification"
    return _pairs(path / "data.jsonl"), "text"


def _labelled(path: Path) -> Path:
    rows = [{"text": f"{WORDS[i % 13]} near {WORDS[i % 5]}", "label": "ab"[i % 13 < 6]} for i in range(32)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _pairs(path: Path) -> Path:
    rows = [
        {"input": f"name : {WORDS[i % 13]}", "target": f"{WORDS[i % 13]} is near {WORDS[i % 5]} ."} for i in range(32)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _cloze(path: Path) -> Path:
    path.write_text('input_template = "{cls}{text}{slot}{slot}{mask}{slot}"\n[verbalizer]\na = "a"\nb = "b"\n')
    return path


def _infix(path: Path) -> Path:
    path.write_text('separator = " {slot}{slot}\\n"\n')
    return path


def _images(path: Path) -> Path:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 32)
    images = (random.random((32, 8, 8)) * 100 + labels[:, None, None] * 100).astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    return path
