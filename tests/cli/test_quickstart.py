"""The quickstart, shortened: every stage runs, and what it says is what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixkit.cli import quickstart, run
from prefixkit.prefix import load
from prefixkit.serving.session import Session


def test_quickstart_trains_exports_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "_MAX_NEW_TOKENS", 20)
    assert run(["quickstart", "-o", str(tmp_path / "q"), "--steps", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["version"] == 1
    assert told["inputs"] == 100
    assert told["max_abs_difference"] <= 1e-4
    assert told["bleu_with_prefix"] != told["bleu_without"]
    assert set(told["seconds"]) == {"train", "inspect", "export", "generate"}
    assert load(tmp_path / "q" / "restaurants.safetensors").manifest.backbone.name == "gpt2-8m"
    session = Session(tmp_path / "q" / "served", device="cpu")
    assert session.generate(["name : Blue Spice | Type : pub"], max_new_tokens=8)[0].text


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quickstart", "-o", str(tmp_path / "no" / "such" / "folder")]) == 2
    assert "expected a folder that can be made" in capsys.readouterr().err
