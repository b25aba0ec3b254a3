"""Capture: text behind a captured context computes what it computes behind the context itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.data.readers import read_examples
from prefixkit.export.onnx import export_onnx
from prefixkit.injections import key_value_prefix
from prefixkit.prefix import load, save
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.serving.session import Session
from prefixkit.task import load_tokenizer
from prefixkit.training.capture import capture

Folder = Callable[..., Path]
Out = pytest.CaptureFixture[str]
CONTEXT = "name : blue spice | area : river\nblue spice is near the river .\nname : eagle | area :"
AFTER = " city\neagle is near the city ."
TOLERANCE = 1e-5
EFFECT = 0.1


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context.txt"
    path.write_text(CONTEXT)
    return path


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "falcon", "bloom"])
def test_logits_are_those_behind_the_context(backbone_folder: Folder, context: Path, family: str) -> None:
    backbone = load_backbone(backbone_folder(family))
    tokenizer = load_tokenizer(backbone.folder)
    prefix = capture(backbone, context)
    before, after = tokenizer.encode_text(CONTEXT), tokenizer.encode_text(AFTER)
    expected = backbone.release()(input_ids=torch.tensor([before + after])).logits[0, len(before) :]
    bare = backbone.model(input_ids=torch.tensor([after])).logits[0]
    found = backbone.logits(torch.tensor([after]), None, key_value_prefix(prefix))[0]
    assert (found - expected).abs().max() <= TOLERANCE
    assert (found - bare).abs().max() > EFFECT
    assert prefix.manifest.provenance.metrics == {"tokens": len(before)}


@torch.no_grad()
def test_two_hundred_tokens_of_a_real_model_are_exact() -> None:
    """In float64: at logits of 18, float32 itself is off by 2e-5."""
    backbone = load_backbone(BACKBONE)
    backbone.model.double()
    tokenizer = load_tokenizer(backbone.folder)
    text = " ".join(f"{one.fields['input']} => {one.target}" for one in read_examples(E2E / "test.jsonl")[:8])
    context, after = tokenizer.encode_text(text)[:200], tokenizer.encode_text(AFTER)
    expected = backbone.release()(input_ids=torch.tensor([context + after])).logits[0, 200:]
    bare = backbone.model(input_ids=torch.tensor([after])).logits[0]
    found = backbone.logits(torch.tensor([after]), None, backbone.key_values_of(context))[0]
    assert (found - expected).abs().max() <= 1e-10
    assert (found - bare).abs().max() > 1.0


def test_onnxruntime_goes_on_where_the_context_ends(backbone_folder: Folder, context: Path, tmp_path: Path) -> None:
    folder = backbone_folder("llama")
    exported = export_onnx(capture(folder, context), folder, tmp_path / "served")
    assert exported.max_abs_difference <= TOLERANCE
    backbone = load_backbone(folder)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_text(CONTEXT) + tokenizer.encode_text(AFTER)
    stop = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    served = Session(tmp_path / "served").generate([AFTER], max_new_tokens=8)[0]
    bare = Session(tmp_path / "served").generate([AFTER], None, max_new_tokens=8)[0]
    assert list(served.token_ids) == backbone.generate([ids], stop=stop, max_new_tokens=8)[0]
    assert served.token_ids != bare.token_ids


def test_a_promised_bos_is_in_the_prefix_once(backbone_folder: Folder, context: Path, tmp_path: Path) -> None:
    folder = backbone_folder("gpt2")
    tokenizer = load_tokenizer(folder)
    path = tmp_path / "task.toml"
    for bos, kept, more in (("none", "none", 0), ("after", "before", 1), ("before", "before", 1)):
        path.write_text(f'bos = "{bos}"\n')
        prefix = capture(folder, context, task=str(path))
        assert prefix.manifest.task is not None
        assert prefix.manifest.task.bos == kept
        assert prefix.manifest.injections[0].length == len(tokenizer.encode_text(CONTEXT)) + more


def test_the_same_context_gives_the_same_bytes(backbone_folder: Folder, context: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(capture(backbone_folder("gpt2"), context), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    kept = load(tmp_path / "one").manifest
    assert (kept.provenance.method, kept.provenance.seed, dict(kept.provenance.config)) == ("capture", None, {})


def test_the_command_says_what_it_wrote(backbone_folder: Folder, context: Path, tmp_path: Path, capfd: Out) -> None:
    output, folder = str(tmp_path / "p"), str(backbone_folder("gpt2"))
    assert run(["capture", "--text", str(context), "--backbone", folder, "-o", output, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["content"] == load(output).manifest.content
    assert run(["inspect", output, "--backbone", folder]) == 0


def test_what_cannot_be_captured_is_one_line(
    backbone_folder: Folder, context: Path, tmp_path: Path, capfd: Out
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_text("river " * 300)
    before = context.read_bytes()
    for text, output, message in (
        ("none.txt", "p", "expected a text file; found no such file; check the path"),
        ("empty.txt", "p", "expected some text; found none; write the text into it"),
        ("latin.txt", "p", "expected a text file in UTF-8"),
        ("long.txt", "p", "expected a text of fewer than 128 tokens, which the backbone can read; found"),
        ("context.txt", "context.txt", "expected a new file; found an input of this run; choose another name"),
        ("context.txt", "none/p", "expected an existing folder"),
    ):
        asked = ["capture", "--text", str(tmp_path / text), "--backbone", str(backbone_folder("gpt2"))]
        assert run([*asked, "-o", str(tmp_path / output)]) == 2
        told = capfd.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert not (tmp_path / "p").exists()
    assert context.read_bytes() == before


def test_training_it_says_which_command_it_is(
    backbone_folder: Folder, records: Path, tmp_path: Path, capfd: Out
) -> None:
    asked = ["train", "--method", "capture", "--backbone", str(backbone_folder("gpt2")), "--data", str(records)]
    assert run([*asked, "-o", str(tmp_path / "p")]) == 2
    assert "found 'capture'; use `prefixkit capture`" in capfd.readouterr().err
