"""`prefixkit export --onnx`: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.prefix import save
from prefixkit.serving.runtime import Runtime
from tests.exported import backbone, exported, random_prefix


@pytest.fixture
def traced_before(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Llama's backbone, with tracing replaced by the graph that another test has traced."""
    path = exported("llama").folder / "onnx" / "model.onnx"
    monkeypatch.setattr("prefixkit.export.decoder.trace", lambda *_: ir.external_data.load_to_model(ir.load(path)))
    return backbone("llama")


@pytest.fixture
def prefix(traced_before: Path, tmp_path: Path) -> Path:
    save(random_prefix(load_backbone(traced_before).identity), tmp_path / "prefix.safetensors")
    return tmp_path / "prefix.safetensors"


def export(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = run(["export", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


def test_says_how_well_it_agrees_and_what_to_do_next(
    prefix: Path, traced_before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = export(capfd, "--onnx", prefix, "--backbone", traced_before, "-o", tmp_path / "served")
    assert code == 0
    assert out.startswith("prefix: max |d| ")
    assert "effect of the prefix" in out
    assert f'next: prefixkit generate {tmp_path / "served"} --prompt "…"' in out
    assert err.split() == ["loading", "…", "tracing", "…", "saving", "…", "verifying", "…"]


def test_json_is_whole(prefix: Path, traced_before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = export(capfd, prefix, "--onnx", "--backbone", traced_before, "-o", tmp_path / "served", "--json")
    document = json.loads(out)
    assert code == 0
    assert set(document) == {"version", "output", "bytes", "max_abs_difference", "parity", "seconds"}
    assert document["max_abs_difference"] <= 1e-4
    assert document["parity"][0]["effect"] > 0.1


def test_bare_backbone_needs_no_prefix(traced_before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, _ = export(capfd, "--onnx", "--backbone", traced_before, "-o", tmp_path / "served")
    assert code == 0
    assert not (tmp_path / "served" / "prefix.safetensors").exists()


def test_disagreement_is_exit_code_1_and_leaves_nothing(
    prefix: Path,
    traced_before: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = Runtime.start
    monkeypatch.setattr(Runtime, "start", lambda self, prefixes: start(self, [None] * len(prefixes)))
    code, _, err = export(capfd, "--onnx", prefix, "--backbone", traced_before, "-o", tmp_path / "served")
    assert code == 1
    assert err.splitlines()[-1].startswith("prefixkit: case 'prefix': expected logits of onnxruntime within 1.0e-04")
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.safetensors"], "export: expected a form to export to; found none; add --onnx"),
        (["x", "--onnx", "--triton"], "export: expected a form to export to; found two; add --onnx"),
        (["--triton", "-o", "y"], "export --triton: expected a folder that --onnx wrote; found none"),
        (["--triton", "x"], "export --triton: expected --output; found none"),
        (["--onnx", "x.safetensors"], "export --onnx: expected --output; found none"),
        (["--onnx", "x.safetensors", "-o", "y"], "export --onnx: expected --backbone; found none"),
        (
            ["--onnx", "-o", "y", "--backbone", "z", "--target", "tpu"],
            "--target: expected portable or cuda; found 'tpu'",
        ),
        (["--onnx", "-o", "y", "--backbone", "z", "--dtype", "int8"], "--dtype: expected float32 or float16"),
        (["--onnx", "-o", "y", "--backbone", "z", "--baked"], "--baked: expected a prefix to bake"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = export(capfd, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"prefixkit: {message}")
