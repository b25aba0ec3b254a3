"""Adapters of ONNX Runtime against PyTorch: none, one and another in the same session."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.load import load_backbone
from prefixkit.bridges.onnx_adapter import export_onnx_adapter, fitted, model_version
from prefixkit.bridges.prefixed_graph import prefixed
from prefixkit.bridges.trial import session
from prefixkit.cli import run
from prefixkit.errors import ConfigError, FormatError, InputError
from prefixkit.export.tracing import trace
from prefixkit.export.weights import save_graph
from prefixkit.format.manifest import InjectionRecord, Positions
from prefixkit.prefix import Array, Prefix, key_values, save
from tests.bridges.folders import EFFECT, STEPS, TOLERANCE, genai, in_pytorch, prefixes, texts
from tests.exported import backbone, random_prefix
from tests.prefixes import small_prefix


@cache
def loaded(family: str) -> Any:
    return session(genai(family) / "model.onnx")


def active(*files: Path) -> tuple[onnxruntime.RunOptions, list[Any]]:
    """Options with these adapters, and the adapters, which must live as long."""
    options, kept = onnxruntime.RunOptions(), []
    for file in files:
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(file))
        options.add_active_adapter(adapter)
        kept.append(adapter)
    return options, kept


def greedy(graph: Any, rows: list[list[int]], *files: Path) -> tuple[Array, list[Array]]:
    """STEPS tokens [rows, steps], and each row's logits [text + steps - 1, vocab]: rows are padded on the left."""
    width = max(map(len, rows))
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    known = {value.name: value for value in graph.get_inputs()}
    past = {
        name: np.zeros((len(rows), value.shape[1], 0, value.shape[3]), np.float32)
        for name, value in known.items()
        if name.startswith("past")
    }
    options, _adapters = active(*files)
    tokens, logits = [], []
    for _ in range(STEPS):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: array for name, array in feeds.items() if name in known} | past
        found, *present = graph.run(None, feeds, options)
        past = dict(zip(past, present, strict=True))
        ids = found[:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        tokens.append(ids)
        logits.append(found)
    whole = np.concatenate(logits, axis=1)
    return np.concatenate(tokens, axis=1), [whole[row, width - len(text) :] for row, text in enumerate(rows)]


@pytest.mark.parametrize("name", [None, "say", "other"])
def test_one_session_serves_none_and_either(name: str | None) -> None:
    files = [] if name is None else [genai("gpt2") / "adapters" / f"{name}.onnx_adapter"]
    prefix = None if name is None else prefixes("gpt2")[name]
    tokens, logits = greedy(loaded("gpt2"), texts(), *files)
    for row, text in enumerate(texts()):
        expected_tokens, expected = in_pytorch("gpt2", prefix, text)
        assert np.abs(logits[row] - expected).max() <= TOLERANCE
        assert tokens[row].tolist() == expected_tokens
        if prefix is not None:
            bare_tokens, bare = in_pytorch("gpt2", None, text)
            assert np.abs(logits[row] - bare)[: len(text)].max() > EFFECT
            assert tokens[row].tolist() != bare_tokens


def test_a_model_that_counts_its_mask(tmp_path: Path) -> None:
    decoder = load_backbone(backbone("bloom"))
    assert isinstance(decoder, Decoder)
    graph = trace(decoder.release(), decoder.geometry)
    prefixed(graph)
    save_graph(graph, tmp_path / "model.onnx", "external", decoder.folder)
    small = random_prefix(decoder.identity)
    prefix = Prefix(small.manifest, {name: 8 * array for name, array in small.tensors.items()})
    export_onnx_adapter(prefix, tmp_path / "p")
    made = session(tmp_path / "model.onnx")
    assert "position_ids" not in {value.name for value in made.get_inputs()}
    rows = [text[:5] for text in texts()]
    tokens, logits = greedy(made, rows, tmp_path / "p")
    for row, text in enumerate(rows):
        expected_tokens, expected = in_pytorch("bloom", prefix, text)
        assert np.abs(logits[row] - expected).max() <= TOLERANCE
        assert tokens[row].tolist() == expected_tokens
        assert np.abs(logits[row] - in_pytorch("bloom", None, text)[1])[: len(text)].max() > EFFECT


def test_the_file_holds_the_numbers_and_the_number_of_the_model(tmp_path: Path) -> None:
    prefix = prefixes("gpt2")["say"]
    done = export_onnx_adapter(prefix, tmp_path / "p")
    adapter = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "p"))
    held = {name: value.numpy() for name, value in adapter.get_parameters().items()}
    for layer, pair in enumerate(key_values(prefix)):
        for role, array in zip(("key", "value"), pair, strict=True):
            assert held.pop(f"prefix.{layer}.{role}").tobytes() == array.tobytes()
    assert held == {}
    assert done.lost == ()
    version = adapter.get_model_version()
    assert version == model_version(prefix.manifest.backbone) > 0
    stated = loaded("gpt2").get_modelmeta().custom_metadata_map
    assert stated["prefixkit.model_version"] == str(version)
    assert stated["prefixkit.weights_hash"] == prefix.manifest.backbone.weights_hash


def test_the_weights_stay_in_their_file() -> None:
    model = ir.load(genai("gpt2") / "model.onnx")
    external = [
        value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)
    ]
    assert {value.const_value.location for value in external if value.const_value} == {"model.onnx.data"}
    assert (genai("gpt2") / "model.onnx").stat().st_size < 64 * 1024


def test_what_dtypes_lose(tmp_path: Path) -> None:
    prefix = small_prefix(seed=1)
    (rounded,) = export_onnx_adapter(prefix, tmp_path / "p", dtype="float16").lost
    assert re.fullmatch(r"float16 rounds the prefix, by 0\.000\d+ at most", rounded)
    assert {array.dtype for array in fitted(prefix, "float16")[0].values()} == {np.dtype(np.float16)}
    # Quarters, which float16 says as they are.
    assert export_onnx_adapter(small_prefix(), str(tmp_path / "p"), dtype="float16").lost == ()
    narrow = small_prefix(seed=1, dtype=ml_dtypes.bfloat16)
    assert export_onnx_adapter(narrow, tmp_path / "p").lost == ()
    for held, array in zip(fitted(narrow)[0].values(), narrow.tensors.values(), strict=True):
        assert (held[0] == array.astype(np.float32)).all()
    unknown = replace(prefix.manifest, backbone=replace(prefix.manifest.backbone, weights_hash=None))
    (sentence,) = export_onnx_adapter(Prefix(unknown, prefix.tensors), tmp_path / "p").lost
    assert sentence == "the weights of the backbone are unknown, so that the adapter's model version is 0"


def test_a_prefix_of_another_shape_is_refused_by_the_runtime(tmp_path: Path) -> None:
    export_onnx_adapter(small_prefix(), tmp_path / "p")
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match=r"prefix\.0\.key"):
        greedy(loaded("gpt2"), texts(), tmp_path / "p")


def test_what_is_refused(tmp_path: Path) -> None:
    prefix = small_prefix()
    (record,) = prefix.manifest.injections
    moved = replace(record, positions=Positions(text_start=0, prefix_takes_positions=False))
    prompt = InjectionRecord(kind="embedding_prompt", stack="decoder", length=3, positions=Positions(text_start=3))
    for changed, told in (
        (moved, "found text that starts at 0"),
        (prompt, "found embedding_prompt; `prefixkit export --onnx` folds a prompt"),
    ):
        with pytest.raises(FormatError, match=told):
            export_onnx_adapter(Prefix(replace(prefix.manifest, injections=(changed,)), prefix.tensors), tmp_path / "p")
    large = Prefix(prefix.manifest, {name: array * 1e6 for name, array in prefix.tensors.items()})
    told = r"expected numbers up to 65504 for float16; found [\d.e+]+; use --dtype float32, for graph and adapter"
    with pytest.raises(InputError, match=told):
        export_onnx_adapter(large, tmp_path / "p", dtype="float16")
    with pytest.raises(ConfigError, match="dtype: expected float32 or float16; found 'int8'"):
        export_onnx_adapter(prefix, tmp_path / "p", dtype="int8")
    with pytest.raises(InputError, match="expected an existing folder"):
        export_onnx_adapter(prefix, tmp_path / "nowhere" / "p")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "p").write_text("mine")
    with pytest.raises(InputError, match="float16"):
        export_onnx_adapter(large, tmp_path / "p", dtype="float16")
    assert (tmp_path / "p").read_text() == "mine"


def test_a_graph_of_something_else_is_refused() -> None:
    ids = ir.val("input_ids", shape=["batch_size", 4], type=ir.TensorType(ir.DataType.INT64))
    node = ir.node("Identity", [ids])
    model = ir.Model(ir.Graph([ids], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
    with pytest.raises(
        FormatError, match=r"past_key_values.N.key\|value and attention_mask; found input_ids; write it w"
    ):
        prefixed(model)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(small_prefix(seed=1), tmp_path / "p")
    arguments = ["export", "--onnx-adapter", str(tmp_path / "p"), "-o", str(tmp_path / "p.onnx_adapter")]
    assert run([*arguments, "--dtype", "float16"]) == 0
    told = capsys.readouterr()
    assert "warning: float16 rounds the prefix" in told.err
    assert told.out.count("\n") == 2
    assert run([*arguments, "--dtype", "bfloat16"]) == 2
    assert "expected dtype=float32 or float16; found 'bfloat16'" in capsys.readouterr().err


def test_what_comes_next_runs(tmp_path: Path) -> None:
    next_line = export_onnx_adapter(prefixes("gpt2")["say"], tmp_path / "p").next
    graph = genai("gpt2") / "model.onnx"
    loading, *steps = next_line.replace(" of the FOLDER that `prefixkit export --genai` wrote", "").split("; ")
    assert loading == 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")'
    known = loaded("gpt2").get_inputs()
    inputs: dict[str, Any] = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in known
        if value.name.startswith("past")
    }
    text = np.array([texts()[0]])
    inputs |= {"input_ids": text, "attention_mask": np.ones_like(text), "position_ids": np.arange(text.size)[None]}
    names = {"onnxruntime": onnxruntime, "session": session(graph), "inputs": inputs}
    exec("; ".join(steps[:-1]), names)
    logits = eval(steps[-1], names)[0][0]
    assert np.abs(logits - in_pytorch("gpt2", prefixes("gpt2")["say"], texts()[0])[1][: text.size]).max() <= TOLERANCE
