"""Fewer nodes that compute the same: which are put together, and which are left as they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers.models.llama import modeling_llama

from prefixkit.backbones.load import load_backbone
from prefixkit.export.emitted import emitted, rotation_of
from prefixkit.export.fused import fuse
from prefixkit.export.onnx import export_onnx
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.prefix_table import Array, served
from prefixkit.serving.report import read_report
from tests.architectures import tiny
from tests.exported import backbone, exported, random_prefix

TOLERANCE = 1e-4
GIVEN = {name: np.random.default_rng(seed).standard_normal((2, 3, 8), np.float32) for seed, name in enumerate("abc")}
WEIGHT = "float[8] w = {1.5, 0.5, 2, 1, -1, 3, 1, 0.25}, float[8] v = {1, 2, 3, 4, 5, 6, 7, 8}"
SUM = "float[rows, seq, 8] s, float[rows, seq, 8] n"


def graph(body: str, values: str, outputs: str = "float[rows, seq, 8] y") -> ir.Model:
    """A graph of three inputs [rows, seq, 8], where the shapes of `values` are known."""
    inputs = ", ".join(f"float[rows, seq, 8] {name}" for name in GIVEN)
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 24]> g ({inputs}) => ({outputs}) <{values}> {{ {body} }}'
    )


def run(model: ir.Model) -> list[Array]:
    given = {one.name: GIVEN[one.name] for one in model.graph.inputs if one.name}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, given)
    return found


def fused(model: ir.Model) -> Counter[str]:
    """How many nodes of each kind there are after; what they compute is the same."""
    expected = run(model)
    fuse(model)
    for found, known in zip(run(model), expected, strict=True):
        assert np.abs(found - known).max() <= 1e-6
    return Counter(node.op_type for node in model.graph)


def of_export(folder: Path) -> tuple[Counter[str], list[onnx.NodeProto]]:
    nodes = onnx.load(folder / "onnx" / "decode.onnx", load_external_data=False).graph.node
    return Counter(node.op_type for node in nodes), [node for node in nodes if node.op_type == "GroupQueryAttention"]


@pytest.mark.parametrize(
    ("norm", "made"),
    [
        ("RMSNormalization<axis = -1, epsilon = 1e-3>(s, w)", "SkipSimplifiedLayerNormalization"),
        ("LayerNormalization<axis = -1, epsilon = 1e-3>(s, w, v)", "SkipLayerNormalization"),
        ("LayerNormalization<axis = 2, epsilon = 1e-3>(s, w)", "SkipLayerNormalization"),
    ],
)
def test_a_norm_adds_and_others_read_the_sum(norm: str, made: str) -> None:
    body = f"s = Add(a, b) t = Mul(s, c) n = {norm} y = Add(n, t)"
    assert fused(graph(body, f"{SUM}, {WEIGHT}")) == {made: 1, "Mul": 1, "Add": 1}


@pytest.mark.parametrize(
    ("body", "values"),
    [
        pytest.param("s = Add(a, v) y = RMSNormalization(s, w)", "float[rows, seq, 8] s", id="a bias"),
        pytest.param(
            "s = Add(a, b) y = RMSNormalization<axis = -1>(s, w)", "float[7] z = {1,1,1,1,1,1,1}", id="unknown"
        ),
        pytest.param("s = Mul(a, b) y = RMSNormalization<axis = -1>(s, w)", "float[rows, seq, 8] s", id="a product"),
        pytest.param("s = Add(a, b) u = Abs(w) y = RMSNormalization<axis = -1>(s, u)", SUM, id="a weight that is made"),
    ],
)
def test_other_norms_stay(body: str, values: str) -> None:
    model = graph(body, f"{values}, {WEIGHT}")
    if "float[7]" in values:
        model.graph.inputs[1].shape = None
    before = Counter(node.op_type for node in model.graph)
    fuse(model)
    assert Counter(node.op_type for node in model.graph) == before


def test_views_that_undo_each_other_go() -> None:
    body = """
        r = Reshape<allowzero = 1>(a, heads) t = Transpose<perm = [0, 2, 1, 3]>(r)
        u = Transpose<perm = [0, 2, 1, 3]>(t) f = Reshape<allowzero = 1>(u, flat) y = Add(f, b)
    """
    values = "float[rows, seq, 8] f, int64[4] heads = {2, 3, 4, 2}, int64[3] flat = {2, 3, 8}"
    assert fused(graph(body, values)) == {"Add": 1}


def test_other_views_stay() -> None:
    body = """
        r = Reshape<allowzero = 1>(a, heads) t = Transpose<perm = [0, 2, 3, 1]>(r)
        u = Transpose<perm = [0, 2, 3, 1]>(t) f = Reshape<allowzero = 0>(u, zero) y = Identity(f)
    """
    values = "float[2, 2, 3, 4] t, int64[4] heads = {2, 3, 4, 2}, int64[3] zero = {0, -1, 4}"
    found = fused(graph(body, values, "float[x, y, z] y"))
    assert found == {"Reshape": 2, "Transpose": 2, "Identity": 1}


@pytest.mark.parametrize(("family", "biases"), [("llama", 0), ("qwen2", 2)])
def test_attention_rotates_what_one_product_gives(family: str, biases: int) -> None:
    found, attention = of_export(exported(family, target="cuda").folder)
    assert [list(node.input[1:3]) for node in attention] == [["", ""]] * 2
    assert all(onnx.helper.get_node_attr_value(node, "do_rotary") == 1 for node in attention)
    # Of each layer: query, key and value; what comes out of attention; three of the MLP; and the head.
    assert found["FusedMatMul"] == 2 * 5 + 1
    assert found["Add"] == biases + 1, "the slots of what is newest"
    assert found["RMSNormalization"] == 1, "behind the embeddings there is nothing to add"
    assert not {"Transpose", "RotaryEmbedding"} & set(found)


def test_heads_that_attention_cannot_rotate_are_rotated_before_it(tmp_path: Path) -> None:
    tiny("llama", head_dim=8).save_pretrained(tmp_path / "model")
    for file in backbone("llama").glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    loaded = load_backbone(tmp_path / "model")
    done = export_onnx(random_prefix(loaded.identity), loaded, tmp_path / "served", target="cuda")
    assert max(case.max_abs_difference for case in done.cases) <= TOLERANCE
    found, attention = of_export(done.folder)
    assert found["RotaryEmbedding"] == 4
    assert not any(onnx.helper.get_node_attr_value(node, "do_rotary") for node in attention)


def test_only_what_comes_out_of_the_rotation_is_known_for_it() -> None:
    query, key, angles = torch.ones(1, 4, 2, 16), torch.ones(1, 2, 2, 16), torch.zeros(1, 2, 16)
    with emitted(tiny("llama")):
        rotated, _ = modeling_llama.apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
        known = rotation_of(rotated)
        assert known is not None
        assert known.before is query
        assert rotation_of(rotated * 1.0) is None
        assert rotation_of(query) is None


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_rotation_goes_by_positions_and_not_by_slots(family: str) -> None:
    runtime = BufferedRuntime(read_report(exported(family, target="cuda").folder), device="cpu", threads=1)
    prefix = served(random_prefix(load_backbone(backbone(family)).identity, length=9, task=None), runtime.dtype)
    found = []
    for start, rows in ((20, 1), (20, 2), (9, 1)):
        made = runtime.rows(rows, 32)
        made.begin(0, replace(prefix, text_start=start))
        # A single row is read by the graph for tokens, and two by that for prompts, which rotates by itself.
        read = made.read(0, [[5, 6, 7], [8]][:rows]).logits[0]
        found.append([read, made.read(0, [[9], [10]][:rows]).logits[0]])
    assert np.abs(np.subtract(found[0], found[1])).max() <= 1e-5
    assert np.abs(np.subtract(found[0], found[2])).max() > 1e-2


def test_a_text_that_fills_its_row_is_rotated_like_any_other() -> None:
    """Where as many tokens come as a row has slots, the operator takes them for the first of all."""
    runtime = BufferedRuntime(read_report(exported("llama", target="cuda").folder), device="cpu", threads=1)
    found = [runtime.rows(1, capacity).read(0, [list(range(5, 14))]).logits for capacity in (9, 64)]
    assert np.abs(found[0] - found[1]).max() <= 1e-5
