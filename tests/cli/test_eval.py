"""`prefixkit eval` on a folder that is not quite the one of training: refused before anything is scored."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.format.manifest import TaskRecord
from prefixkit.prefix import save
from prefixkit.task import chat_template_hash
from tests.exported import TASK, backbone, random_prefix

Out = pytest.CaptureFixture[str]
CHAT = replace(TASK, input_template="{input}", separator="", chat_template_hash=chat_template_hash("of training"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(backbone("gpt2"), tmp_path / "backbone"))


def evaluated(folder: Path, tmp_path: Path, task: TaskRecord, *more: str) -> int:
    save(random_prefix(load_backbone(backbone("gpt2")).identity, task=task), tmp_path / "p")
    (tmp_path / "data.jsonl").write_text(json.dumps({"input": "Blue Spice", "target": "a pub"}) + "\n")
    asked = ["eval", str(tmp_path / "p"), "--backbone", str(folder), "--data", str(tmp_path / "data.jsonl")]
    return run([*asked, "--max-new-tokens", "2", *more])


def swap_ids(folder: Path) -> None:
    """Give two tokens each other's ids."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(stored))


def test_swapped_tokens_are_refused_unless_allowed(folder: Path, tmp_path: Path, capfd: Out) -> None:
    swap_ids(folder)
    assert evaluated(folder, tmp_path, TASK) == 2
    assert "(checked tokenizer; geometry, config and weights agree)" in capfd.readouterr().err
    assert evaluated(folder, tmp_path, TASK, "--allow-mismatch") == 0


def test_another_chat_template_is_refused(folder: Path, tmp_path: Path, capfd: Out) -> None:
    (folder / "chat_template.jinja").write_text("another")
    assert evaluated(folder, tmp_path, CHAT) == 2
    told = "expected the chat template that the prefix was trained with; found another"
    assert told in capfd.readouterr().err


def test_a_log_file_gets_no_bar_and_no_blank_line(folder: Path, tmp_path: Path, capfd: Out) -> None:
    assert evaluated(folder, tmp_path, TASK) == 0
    told = capfd.readouterr()
    assert told.err == ""
    assert told.out.startswith("1 inputs, 1 references\nloss ")
