"""`prefixkit self-study`, and the cartridge that is trained on what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixkit.cli import run
from prefixkit.prefix import load

Folder = Callable[..., Path]
Out = pytest.CaptureFixture[str]
DOCUMENT = "name : blue spice | area : river\nname : eagle | area : city\n\nname : mill | area : near\n"


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    return path


def study(folder: Path, document: Path, output: Path, *more: str) -> int:
    asked = ["self-study", str(document), "--backbone", str(folder), "-o", str(output), "--max-new-tokens", "6"]
    return run([*asked, "--count", "12", *more])


def test_questions_begin_the_lines_of_the_document(backbone_folder: Folder, document: Path, tmp_path: Path) -> None:
    assert study(backbone_folder("gpt2"), document, tmp_path / "one.jsonl") == 0
    assert study(backbone_folder("gpt2"), document, tmp_path / "two.jsonl") == 0
    assert study(backbone_folder("gpt2"), document, tmp_path / "other.jsonl", "--seed", "1") == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert (tmp_path / "one.jsonl").read_bytes() != (tmp_path / "other.jsonl").read_bytes()
    records = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    lines = [line for line in DOCUMENT.splitlines() if line]
    assert all(any(line.startswith(f"{record['input']} ") for line in lines) for record in records)
    assert {next(line for line in lines if line.startswith(record["input"])) for record in records} >= set(lines[1:])
    assert len({record["target"] for record in records}) > 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_cartridge_learns_from_them(
    backbone_folder: Folder, document: Path, tmp_path: Path, capfd: Out, family: str
) -> None:
    folder, data = backbone_folder(family), tmp_path / "study.jsonl"
    assert study(folder, document, data) == 0
    output = tmp_path / "cartridge.safetensors"
    asked = ["train", "--method", "cartridge", "--set", f"method.document={document}", "--task", "continuation"]
    asked += ["--backbone", str(folder), "--data", str(data), "--eval-data", str(data), "-o", str(output)]
    asked += ["--length", "6", "--lr", "0.05", "--json"]
    assert run([*asked, "--steps", "0"]) == 0
    start = load(output).manifest.provenance.metrics
    capfd.readouterr()
    assert run([*asked, "--steps", "40"]) == 0
    trained = json.loads(capfd.readouterr().out)["metrics"]["validation_loss"]
    assert start == {"steps": 0.0}
    settings = load(output).manifest.provenance.config["method"]
    assert settings["document"].startswith("b3-v1:")
    assert str(tmp_path) not in json.dumps(settings)
    assert load(output).manifest.injections[0].frozen_slots == 1
    assert run([*asked, "--steps", "1", "--lr", "1e-6"]) == 0
    assert trained < json.loads(capfd.readouterr().out)["metrics"]["validation_loss"] - 0.01


def test_a_document_without_lines_is_refused(backbone_folder: Folder, tmp_path: Path, capfd: Out) -> None:
    (tmp_path / "empty.txt").write_text("one\ntwo\n")
    assert study(backbone_folder("gpt2"), tmp_path / "empty.txt", tmp_path / "out") == 2
    assert "document: expected a line of two words or more; found none" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_studied_is_one_line(
    backbone_folder: Folder, document: Path, tmp_path: Path, capfd: Out
) -> None:
    (tmp_path / "long.txt").write_text("the blue river\n" * 60)
    for text, output, message in (
        (
            tmp_path / "long.txt",
            tmp_path / "out",
            "expected a text of fewer than 128 tokens, which the backbone can read",
        ),
        (document, document, "expected a new file; found an input of this run; choose another name"),
        (document, tmp_path / "none" / "out", "expected an existing folder"),
    ):
        assert study(backbone_folder("gpt2"), text, output) == 2
        told = capfd.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert document.read_text() == DOCUMENT
