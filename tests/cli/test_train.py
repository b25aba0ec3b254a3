"""`prefixkit train` from the outside: files, exit codes, one line for every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixkit.cli import run
from prefixkit.methods.catalogue import METHODS
from prefixkit.prefix import load

Folder = Callable[..., Path]


def arguments(folder: Path, records: Path, output: Path, *more: str) -> list[str]:
    given = ["train", "--backbone", str(folder), "--method", "prefix-tuning", "--data", str(records), "-o", str(output)]
    return [*given, "--steps", "2", "--length", "3", "--batch-size", "4", *more]


def test_trains_and_says_what_is_next(
    backbone_folder: Folder, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "p.safetensors"
    assert run(arguments(backbone_folder("gpt2"), records, output)) == 0
    told = capsys.readouterr()
    assert f"wrote {output}" in told.out
    assert f"next: prefixkit inspect {output}" in told.out
    assert "tok/s" in told.err
    assert load(output).manifest.injections[0].length == 3
    assert run(["inspect", str(output), "--backbone", str(backbone_folder("gpt2"))]) == 0
    assert run(["inspect", str(output), "--backbone", str(backbone_folder("gpt2", 1))]) == 2


def test_the_next_command_can_be_pasted(
    backbone_folder: Folder, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a prefix"
    assert run(arguments(backbone_folder("gpt2"), records, output)) == 0
    assert f"next: prefixkit inspect '{output}'" in capsys.readouterr().out


def test_json_is_one_object(
    backbone_folder: Folder, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(backbone_folder("gpt2"), records, tmp_path / "p", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["version"] == 1
    assert told["content"] == load(tmp_path / "p").manifest.content
    assert told["metrics"]["steps"] == 2


def test_flags_override_the_file_and_set_overrides_both(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('seed = 1\n[method]\nlength = 9\ninit = "zeros"\n[optimizer]\nlr = 0.5\n')
    output = tmp_path / "p"
    more = ["--config", str(config), "--seed", "2", "--set", "optimizer.lr=0.25"]
    assert run(arguments(backbone_folder("gpt2"), records, output, *more)) == 0
    provenance = load(output).manifest.provenance
    assert provenance.seed == 2
    assert provenance.config["method"]["length"] == 3
    assert provenance.config["method"]["init"] == "zeros"
    assert provenance.config["optimizer"]["lr"] == 0.25


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--method", "prefix-tunning"], "did you mean 'prefix-tuning'?"),
        (["--length", "0"], "--length: expected at least 1; found 0"),
        (["--length", "4000"], "expected a prefix shorter than the context of 128 tokens"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--backbone", "./nowhere"], "./nowhere: expected a folder"),
        (["--set", "lr"], "--set: expected KEY=VALUE"),
        (["--config", "nowhere.toml"], "nowhere.toml: expected a TOML file; found no such file"),
        (["--stepps", "3"], "--stepps"),
        (["--set", "tasks=3"], "prefixkit: train [[tasks]]: expected a list of tables; found 3"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    backbone_folder: Folder,
    records: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    told: str,
) -> None:
    assert run(arguments(backbone_folder("gpt2"), records, tmp_path / "p", *more)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("prefixkit: ")
    assert told in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_eval_scores_the_prefix_and_the_bare_model(
    backbone_folder: Folder, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, folder = tmp_path / "p", str(backbone_folder("gpt2"))
    assert run(arguments(Path(folder), records, prefix)) == 0
    asked = ["eval", str(prefix), "--backbone", folder, "--data", str(records), "--limit", "4", "--json"]
    asked += ["--max-new-tokens", "5", "-o", str(tmp_path / "written.jsonl")]
    capsys.readouterr()
    found = {}
    for name, more in (("prefix", []), ("bare", ["--no-prefix"])):
        assert run([*asked, *more]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["prefix"]["inputs"] == 4
    assert set(found["prefix"]["metrics"]) == {"loss", "bleu", "nist", "rouge_l", "cider"}
    assert found["prefix"]["metrics"]["loss"] != found["bare"]["metrics"]["loss"]
    lines = [json.loads(line) for line in (tmp_path / "written.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"input", "written", "references"}] * 4


def test_eval_refuses_another_backbone(
    backbone_folder: Folder, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(backbone_folder("gpt2"), records, tmp_path / "p")) == 0
    other = str(backbone_folder("gpt2", 1))
    assert run(["eval", str(tmp_path / "p"), "--backbone", other, "--data", str(records)]) == 2
    assert "weights hash" in capsys.readouterr().err


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert [entry["name"] for entry in listed] == list(METHODS)
    assert all(entry["paper"] and entry["trains"] for entry in listed)
    assert run(["methods"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{name}  " in f"\n{told}" for name in METHODS)
    assert "--init text, text:WORDS, random, zeros, prefix:FILE" in told
