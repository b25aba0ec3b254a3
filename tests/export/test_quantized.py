"""Weights of four and eight bits: what is stored, that the graphs compute with it, and how far it is from the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.errors import ConfigError
from prefixkit.export.onnx import Exported, export_onnx
from prefixkit.export.quantized import BLOCK, round_linear
from prefixkit.prefix import Array, load
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.prefix_table import served
from prefixkit.serving.report import read_report
from tests.exported import backbone, random_prefix, root

TOLERANCE, EFFECT = 1e-4, 0.5
WORST = {"int4": 1 / 8, "int8": 1 / 128}
"""Half a step, of the largest number of a block; twice that where a block ends at its scarcer sign."""


def quantized(family: str, kind: str) -> Exported:
    folder = root() / f"{family}-{kind}"
    if folder.exists():
        return Exported(folder, (), {}, 0)
    loaded = load_backbone(backbone(family))
    return export_onnx(random_prefix(loaded.identity), loaded, folder, target="cuda", quantize=kind)  # type: ignore[arg-type]


def by_hand(stored: dict[str, Array], name: str, inputs: int) -> Array:
    """The weight [inputs, outputs] that a file holds, number by number."""
    packed, scales = stored[f"{name}.packed"], stored[f"{name}.scales"]
    outputs, _, width = packed.shape
    weight = np.zeros((inputs, outputs), dtype=np.float32)
    for output in range(outputs):
        for each in range(inputs):
            block, inside = divmod(each, BLOCK)
            byte = int(packed[output, block, inside * width // BLOCK])
            level = byte - 128 if width == BLOCK else (byte >> 4 if inside % 2 else byte & 15) - 8
            weight[each, output] = level * scales[output, block]
    return weight


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_graphs_compute_with_what_is_stored(kind: str) -> None:
    """Against the unmodified model with its weights unpacked by hand, behind a prefix."""
    done = quantized("llama", kind)
    stored = load_file(done.folder / "onnx" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(backbone("llama"))
    for name, parameter in model.named_parameters():
        if f"{name}.packed" in stored:
            rounded = torch.from_numpy(by_hand(stored, name, parameter.shape[1])).T
            apart = (rounded - parameter).abs().max() / parameter.abs().max()
            assert 0 < apart <= WORST[kind]
            parameter.data = rounded
    prefix = load(done.folder / "prefix.safetensors")
    expected, without = (logits(model, prefix_or_none, done) for prefix_or_none in (prefix, None))
    found = in_onnxruntime(done)
    assert np.abs(found - expected).max() <= TOLERANCE
    assert np.abs(expected - without).max() > EFFECT


def logits(model: torch.nn.Module, prefix: object, done: Exported) -> Array:
    import prefixkit

    if prefix is not None:
        prefixkit.attach(model, prefix, allow_mismatch=True)  # type: ignore[arg-type]
    with torch.no_grad():
        found: Array = model(torch.tensor([[5, 9, 7]])).logits[0, -1].numpy()
    if prefix is not None:
        prefixkit.detach(model)  # type: ignore[arg-type]
    return found


def in_onnxruntime(done: Exported) -> Array:
    runtime = BufferedRuntime(read_report(done.folder), device="cpu", threads=1)
    rows = runtime.rows(1, 32)
    rows.begin(0, served(load(done.folder / "prefix.safetensors"), runtime.dtype))
    rows.read(0, [[5, 9]])
    return rows.read(0, [[7]]).logits[0]


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_folder_is_small_and_says_so(kind: str) -> None:
    done = quantized("llama", kind)
    report = json.loads((done.folder / "export.json").read_text())
    assert report["quantized"]["weights"] == kind
    assert report["graph"]["weights"] == "external"
    for name in ("model.onnx", "decode.onnx"):
        graph = onnx.load(done.folder / "onnx" / name, load_external_data=False).graph
        outside = {one.name for one in graph.initializer if one.external_data}
        made = [node for node in graph.node if node.op_type == "MatMulNBits"]
        assert len(made) == 14
        assert {entry for node in made for entry in node.input[1:3]} <= outside
        assert not any(node.op_type in ("MatMul", "Gemm") and node.input[1] in outside for node in graph.node)
    assert not list((done.folder / "onnx").glob("*.data")), "one file of weights for all graphs"


def test_biases_and_inputs_that_fill_no_block(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=40, n_head=5, vocab_size=64, n_positions=64)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    done = export_onnx(None, tmp_path / "model", tmp_path / "served", target="cuda", quantize="int4")
    assert done.max_abs_difference <= TOLERANCE


def test_a_given_model_is_left_alone(tmp_path: Path) -> None:
    loaded = load_backbone(backbone("gpt2"))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    export_onnx(None, loaded, tmp_path / "served", target="cuda", quantize="int4")
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_model_without_linear_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=0, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(ConfigError, match="expected linear layers; found none in gpt2"):
        round_linear(model, "int4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cuda", "--quantize", "int3"], "--quantize: expected int4 or int8; found 'int3'"),
        (["--quantize", "int4"], "--quantize: expected --target cuda; found --target portable"),
        (
            ["--target", "cuda", "--quantize", "int4", "--weights", "checkpoint"],
            "--quantize: expected rounded weights in a file of their own; found checkpoint; leave --weights out",
        ),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "--onnx", "-o", "y", "--backbone", "z", *options]) == 2
    assert capfd.readouterr().err == f"prefixkit: {message}\n"
