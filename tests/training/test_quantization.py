"""A backbone of four bits a weight: the gradient is that of the rounded weights, and the file says what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from prefixkit.backbones import quantization
from prefixkit.backbones.identity import memory_digest
from prefixkit.backbones.load import load_backbone
from prefixkit.backbones.recomputation import recompute
from prefixkit.cli import run as prefixkit
from prefixkit.errors import BackboneError, ConfigError, PrefixkitError
from prefixkit.prefix import load
from prefixkit.training import loop
from prefixkit.training.memory import estimate
from prefixkit.training.preparation import Prepared
from tests.training.every_kind import KINDS, PAIRS, prepared
from tests.training.test_loop import Interrupted, settings

Folder = Callable[..., Path]
Out = pytest.CaptureFixture[str]
CELLS = [
    next(pair for pair in PAIRS if pair[1] == family and pair[0] not in ("bitfit", "linear-probe")) for family in KINDS
] + [("prompt-tuning", "llama"), ("prompt-tuning", "t5"), ("p-tuning-v2", "bert"), ("autoprompt", "gpt2")]


def rounded(model: nn.Module) -> int:
    """Put float layers of the same rounded weights in the place of the quantised ones; gives their number."""
    found = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear4bit):
                layer = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                layer.weight.data = dequantize_4bit(child.weight.data, child.weight.quant_state).float()
                if child.bias is not None:
                    layer.bias.data = child.bias.data.clone()
                setattr(module, name, layer.requires_grad_(False))
                found += 1
    return found


def loss_and_gradients(run: Prepared) -> tuple[Tensor, list[Tensor]]:
    loss = run.objective(run.backbone, run.batches.batch(0), run.method())
    leaves = [weight for weight in run.method.parameters() if weight.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(("method", "family"), CELLS)
def test_gradients_are_those_of_the_rounded_weights(method: str, family: str, tmp_path: Path) -> None:
    run = prepared(method, family, tmp_path, quantize="nf4")
    loss, gradients = loss_and_gradients(run)
    # A pass without gradients comes in between, as in every run: it must leave the layers as they are.
    with torch.no_grad():
        run.objective(run.backbone, run.batches.batch(1), run.method())
    again, others = loss_and_gradients(run)
    recompute(run.backbone.model)
    twice, recomputed = loss_and_gradients(run)
    assert rounded(run.backbone.model) > 5
    expected, right = loss_and_gradients(run)
    for found in (loss, again, twice):
        assert abs(found - expected) <= 1e-5 * abs(expected)
    for parts in zip(gradients, others, recomputed, right, strict=True):
        for found in parts[:3]:
            assert (found - parts[3]).abs().max() <= 1e-4 * max(1e-3, float(parts[3].abs().max()))
    assert any(gradient.abs().max() > 1e-4 for gradient in right)


def test_a_trained_file_names_the_same_backbone_and_says_what_it_computed_with(
    backbone_folder: Folder, records: Path, tmp_path: Path, capfd: Out
) -> None:
    folder, heard = backbone_folder("llama"), Interrupted()
    config = settings(folder, records, tmp_path / "p", quantize="nf4", steps=40)
    written = loop.train(config, listener=heard)
    assert heard.validations[-1].loss < heard.validations[0].loss
    plain = loop.train(settings(folder, records, tmp_path / "plain", steps=1))
    assert written.manifest.backbone == plain.manifest.backbone
    assert written.manifest.provenance.config["quantize"] == "nf4"
    assert "quantize" not in plain.manifest.provenance.config
    assert prefixkit(["inspect", str(tmp_path / "p"), "--backbone", str(folder)]) == 0
    told = capfd.readouterr().out
    assert '"quantize": "nf4"' in told
    assert "fits backbone    yes" in told
    scoring = ["eval", str(tmp_path / "p"), "--backbone", str(folder), "--data", str(records), "--max-new-tokens", "2"]
    assert prefixkit([*scoring, "--quantize", "nf4", "--json"]) == 0
    same = json.loads(capfd.readouterr().out)["metrics"]["loss"]
    assert prefixkit([*scoring, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["metrics"]["loss"] != same
    exporting = ["export", "--onnx", str(tmp_path / "p"), "--backbone", str(folder), "-o", str(tmp_path / "out")]
    assert prefixkit(exporting) == 0
    assert "trained on a backbone of nf4 weights, and the graph has those of the folder" in capfd.readouterr().err
    assert abs(same - load(tmp_path / "p").manifest.provenance.metrics["validation_loss"]) < 1e-4


def test_weights_take_a_quarter_of_half_precision(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    runs = [prepared("prefix-tuning", "llama", tmp_path / str(kind), quantize=kind) for kind in (None, "nf4")]
    whole, small = (estimate(run).weights for run in runs)
    layers = sum(weight.nbytes for weight in runs[0].backbone.model.model.layers.parameters() if weight.ndim == 2)
    # 4 bits of 32, and what the blocks' scales take, which are few in layers as small as these.
    assert whole - small == pytest.approx(layers * 7 / 8, rel=0.1)


def test_weights_that_change_are_noticed(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(backbone_folder("gpt2"), quantize="nf4")
    before = memory_digest(backbone.model)
    layer = next(module for module in backbone.model.modules() if isinstance(module, Linear4bit))
    layer.weight.data[0] ^= 1
    assert memory_digest(backbone.model) != before
    layer.weight.data[0] ^= 1
    assert memory_digest(backbone.model) == before
    real = loop.advance

    def touch(run: Prepared, *rest: Any) -> Any:
        next(module for module in run.backbone.model.modules() if isinstance(module, Linear4bit)).weight.data[0] ^= 1
        return real(run, *rest)

    monkeypatch.setattr(loop, "advance", touch)
    with pytest.raises(PrefixkitError, match="weights that changed during training"):
        loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "p", quantize="nf4", steps=1))


def test_bitfit_is_refused_in_training_and_in_evaluation(
    backbone_folder: Folder, records: Path, tmp_path: Path, capfd: Out
) -> None:
    asked = settings(backbone_folder("gpt2"), records, tmp_path / "p", method={"name": "bitfit"}, steps=1)
    loop.train(asked)
    with pytest.raises(ConfigError, match="leaves the parameters of a quantized backbone alone; found bitfit"):
        prepared("bitfit", "gpt2", tmp_path, quantize="nf4")
    scoring = ["eval", str(tmp_path / "p"), "--backbone", str(backbone_folder("gpt2")), "--data", str(records)]
    assert prefixkit([*scoring, "--quantize", "nf4"]) == 2
    assert "found a parameter_delta" in capfd.readouterr().err


def test_what_cannot_be_quantised_is_refused(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = backbone_folder("gpt2")
    with pytest.raises(ConfigError, match="--quantize: expected nf4; found 'int8'"):
        settings(folder, records, tmp_path / "p", quantize="int8")
    with pytest.raises(ConfigError, match="--quantize: expected nf4; found 'int8'"):
        load_backbone(folder, quantize="int8")
    with pytest.raises(BackboneError, match="expected linear layers to quantize; found none"):
        quantization.settle(nn.Linear(2, 2), "model")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"found none; pip install 'prefixkit\[quantized\]'"):
        load_backbone(folder, quantize="nf4")
