"""`prefixkit inspect`: what it tells, what it refuses, and what it never imports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefixkit.cli import run
from prefixkit.cli.render import plain, sections_of
from prefixkit.format.digest import backbone_digest, config_hash, tokenizer_hash
from prefixkit.prefix import Prefix, load, save
from tests.format.test_header import BOMBS
from tests.prefixes import GOLDEN, small_prefix, write_safetensors

Out = pytest.CaptureFixture[str]


def test_the_golden_file_explained(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.chdir(GOLDEN.parent)
    assert run(["inspect", GOLDEN.name]) == 0
    assert capsys.readouterr().out == (GOLDEN.parent / "inspect.txt").read_text(encoding="utf-8")


def test_json_is_versioned_and_complete(capsys: Out) -> None:
    assert run(["inspect", str(GOLDEN), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    prefix = load(GOLDEN)
    assert sorted(report) == ["bytes", "manifest", "match", "path", "problems", "tensors", "version"]
    assert (report["version"], report["problems"], report["match"]) == (1, [], None)
    assert report["bytes"] == GOLDEN.stat().st_size
    assert report["manifest"]["content"] == prefix.manifest.content
    assert report["tensors"][0] == {
        "name": "decoder.self.layers.0.key",
        "dtype": "F32",
        "shape": [2, 2, 4],
        "bytes": 64,
        "injection": 0,
    }


def test_every_kind_of_the_corpus_can_be_shown() -> None:
    for path in sorted((Path(__file__).parents[1] / "format" / "corpus" / "good").iterdir()):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        report = {"path": "x", "bytes": 1, "problems": [], "manifest": manifest, "tensors": [], "match": None}
        shown = plain(list(sections_of(report)))
        assert all(f"injection: {record['kind']}" in shown for record in manifest["injections"])


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert run(["inspect", str(GOLDEN)]) == 0
    told = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, told.splitlines())) <= 60
    assert "key_value_prefix" in told


def test_nothing_in_a_file_steers_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    prefix = small_prefix()
    backbone = replace(prefix.manifest.backbone, name="\x1b]0;owned\x07 [red]")
    save(Prefix(replace(prefix.manifest, backbone=backbone), prefix.tensors), tmp_path / "x")
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert run(["inspect", str(tmp_path / "x")]) == 0
        told = capsys.readouterr().out
        assert "\\x1b]0;owned\\x07 [red]" in told
        assert "\x07" not in told


def test_a_terminal_without_unicode_shows_escapes(tmp_path: Path) -> None:
    prefix = small_prefix()
    backbone = replace(prefix.manifest.backbone, name="中")
    save(Prefix(replace(prefix.manifest, backbone=backbone), prefix.tensors), tmp_path / "x")
    command = [sys.executable, "-c", "from prefixkit.cli import main; main()", "inspect", str(tmp_path / "x")]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ascii_only)
    assert "backbone: \\u4e2d" in done.stdout


def test_all_problems_are_listed(tmp_path: Path, capsys: Out) -> None:
    damaged = GOLDEN.read_bytes().replace(b"layers.0", b"layers.7")
    (tmp_path / "x").write_bytes(damaged)
    assert run(["inspect", str(tmp_path / "x")]) == 2
    told = capsys.readouterr()
    assert [line.split()[0] for line in told.out.splitlines()] == [
        f"{tmp_path}/x:",
        *["/injections"] * 2,
        *["/injections/0"] * 2,
    ]
    assert told.err.count("\n") == 1
    assert told.err.endswith("(and 3 more): listed above\n")
    assert run(["inspect", str(tmp_path / "x"), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (len(report["problems"]), report["manifest"], report["tensors"]) == (4, None, [])


def test_a_future_file_says_what_to_upgrade(tmp_path: Path, capsys: Out) -> None:
    header = {"__metadata__": {"format": "pt", "prefixkit": '{"schema":2,"new":true}'}}
    assert run(["inspect", str(write_safetensors(tmp_path / "x", header))]) == 2
    told = "/schema: prefixkit 0.1.0 reads schema 1; this file is schema 2: upgrade prefixkit"
    assert capsys.readouterr().err == f"prefixkit: {tmp_path}/x {told}\n"


def metadata(text: str) -> dict[str, Any]:
    return {"__metadata__": {"format": "pt", "prefixkit": text}}


BAD: dict[str, Callable[[Path], Path]] = {
    "nothing": lambda path: path,
    "a folder": lambda path: path.parent,
    "empty": lambda path: write_bytes(path, b""),
    "a claim of 1 GiB": lambda path: write_bytes(path, (2**30).to_bytes(8, "little")),
    "truncated header": lambda path: write_bytes(path, GOLDEN.read_bytes()[:500]),
    "truncated data": lambda path: write_bytes(path, GOLDEN.read_bytes()[:-1]),
    "more data": lambda path: write_bytes(path, GOLDEN.read_bytes() + b"\0"),
    "flipped data": lambda path: write_bytes(path, GOLDEN.read_bytes()[:-1] + b"\x01"),
    "no manifest": lambda path: write_safetensors(path, {}),
    "a manifest that is no JSON": lambda path: write_safetensors(path, metadata("{")),
    "a manifest that is a list": lambda path: write_safetensors(path, metadata("[]")),
    "a manifest with a key twice": lambda path: write_safetensors(path, metadata('{"a":1,"a":2}')),
    "a manifest with NaN": lambda path: write_safetensors(path, metadata('{"a":NaN}')),
    "a manifest with half a character": lambda path: write_safetensors(path, metadata('{"\\ud800":1}')),
    "a manifest nested without an end": lambda path: write_safetensors(path, metadata("[" * 100_000)),
    "a manifest of one field": lambda path: write_safetensors(path, metadata('{"schema":1}')),
    "a manifest of a million problems": lambda path: write_safetensors(path, BOMB),
    "an enormous header": lambda path: write_safetensors(path, BOMBS["empty lists"]),
}
BOMB = metadata('{"schema":1,"injections":[' + "0," * 900_000 + "0]}")


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_exit_2(name: str, tmp_path: Path, capsys: Out) -> None:
    path = BAD[name](tmp_path / "x")
    assert run(["inspect", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"prefixkit: {path}")
    assert (told.count("\n"), "internal error" in told) == (1, False)


def test_bad_files_cost_no_memory(tmp_path: Path) -> None:
    paths = [BAD[name](tmp_path / str(number)) for number, name in enumerate(BAD)]
    script = """
import resource, sys
from prefixkit.cli import run
for path in sys.argv[1:]:
    assert run(["inspect", path]) == 2
peak = next((line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), None)
print(peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 200 * 1024


@pytest.fixture
def fitting(backbone_folder: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A prefix and the folder of the backbone that it was made for."""
    folder = backbone_folder("gpt2")
    config = json.loads((folder / "config.json").read_text())
    prefix = small_prefix(layers=config["n_layer"])
    backbone = replace(
        prefix.manifest.backbone,
        hidden_size=config["n_embd"],
        vocab_size=config["vocab_size"],
        config_hash=config_hash(folder),
        weights_hash=backbone_digest(folder),
        tokenizer_hash=tokenizer_hash(folder),
    )
    save(Prefix(replace(prefix.manifest, backbone=backbone), prefix.tensors), tmp_path / "x")
    return tmp_path / "x", folder


def test_the_backbone_that_it_was_made_for(fitting: tuple[Path, Path], capsys: Out) -> None:
    path, folder = fitting
    assert run(["inspect", str(path), "--backbone", str(folder)]) == 0
    assert "yes: geometry, config and weights agree" in capsys.readouterr().out
    assert run(["inspect", str(path), "--backbone", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["match"] == {"level": "weights", "same_tokenizer": True}


def copied(folder: Path, target: Path, **config: Any) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    stored = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**stored, **config}))
    return target


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"n_layer": 9}, "found 9 (checked geometry)"),
        ({"n_embd": 24}, "found 24 (checked geometry)"),
        ({"model_type": "llama"}, "architecture gpt2; found llama (checked config; geometry agrees)"),
        ({"activation_function": "relu"}, "(checked config; geometry agrees)"),
        ({}, "(checked weights; geometry and config agree)"),
    ],
)
def test_another_backbone_is_named_with_its_level(
    config: dict[str, Any], told: str, fitting: tuple[Path, Path], tmp_path: Path, capsys: Out
) -> None:
    path, folder = fitting
    other = copied(folder, tmp_path / "other", **config)
    weights = load_file(other / "model.safetensors")
    name = min(weights)
    save_file({**weights, name: weights[name] + np.float32(1)}, other / "model.safetensors")
    assert run(["inspect", str(path), "--backbone", str(other)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"prefixkit: {path} on {other}: expected ")
    assert told in line
    assert run(["inspect", str(path), "--backbone", str(other), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["match"]["level"] is None


def test_another_tokenizer_is_refused(fitting: tuple[Path, Path], tmp_path: Path, capsys: Out) -> None:
    path, folder = fitting
    other = copied(folder, tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    assert run(["inspect", str(path), "--backbone", str(other)]) == 2
    told = capsys.readouterr()
    assert re.search(r"fits backbone +no\n", told.out)
    assert "(checked tokenizer; geometry, config and weights agree)" in told.err


def test_a_folder_without_a_tokenizer_is_told(fitting: tuple[Path, Path], tmp_path: Path, capsys: Out) -> None:
    path, folder = fitting
    other = copied(folder, tmp_path / "other")
    (other / "tokenizer.json").unlink()
    assert run(["inspect", str(path), "--backbone", str(other)]) == 0
    assert re.search(r"tokenizer +not compared", capsys.readouterr().out)
    assert run(["inspect", str(path), "--backbone", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["match"] == {"level": "weights", "same_tokenizer": None}


def test_a_folder_that_is_no_backbone(capsys: Out, tmp_path: Path) -> None:
    assert run(["inspect", str(GOLDEN), "--backbone", str(tmp_path)]) == 2
    assert "expected model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "found"), [("openai-community/gpt2", "none of that name"), (str(GOLDEN), "a file")])
def test_a_hub_id_is_told_to_be_no_folder(name: str, found: str, capsys: Out) -> None:
    assert run(["inspect", str(GOLDEN), "--backbone", name]) == 2
    told = (
        f"prefixkit: --backbone {name}: expected a local model folder; found {found}; download the model and give its"
    )
    assert capsys.readouterr().err.startswith(told)


HEAVY = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "pydantic", "jsonschema", "rich", "safetensors")


def heavy_imports(script: str, *arguments: str) -> list[str]:
    told = f"{script}\nimport sys, json\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    command = [sys.executable, "-c", told, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


INSPECT = "import sys\nfrom prefixkit.cli import run\nassert run(sys.argv[1:]) == 0"


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_inspect_imports_nothing_heavy(option: tuple[str, ...]) -> None:
    assert heavy_imports(INSPECT, "inspect", str(GOLDEN), *option) == []


def test_nor_does_the_full_check(fitting: tuple[Path, Path]) -> None:
    path, folder = fitting
    assert heavy_imports(INSPECT, "inspect", str(path), "--backbone", str(folder)) == []


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_the_purity_test_can_fail(name: str) -> None:
    assert name in heavy_imports(f"import {name}\n{INSPECT}", "inspect", str(GOLDEN))
