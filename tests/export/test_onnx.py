"""The exported folder: what is in it, that it computes what PyTorch computes, and that nothing else is ever written."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

import prefixkit.export.decoder as subject
from prefixkit.backbones.load import load_backbone
from prefixkit.errors import ConfigError, InputError, MismatchError, ParityError
from prefixkit.export.onnx import Exported, export_onnx
from prefixkit.export.parity import tolerance
from prefixkit.injections import key_value_prefix
from prefixkit.prefix import load, save
from prefixkit.serving.prefix_table import served
from prefixkit.serving.report import read_report
from prefixkit.serving.runtime import Runtime
from tests.exported import LENGTH, backbone, exported, random_prefix
from tests.ragged import alone, prompts

FAST = ["gpt2", "llama"]
EFFECT = 0.1


def graph_of(done: Exported) -> onnx.ModelProto:
    return onnx.load(done.folder / "onnx" / "model.onnx", load_external_data=False)


def dimensions(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def assert_parity(done: Exported, tolerance: float) -> None:
    for case in done.cases:
        assert case.max_abs_difference <= tolerance, case
        assert case.effect is None or case.effect > EFFECT, case
    assert any(case.effect is not None for case in done.cases)
    assert any(len(set(case.rows)) > 1 for case in done.cases)  # ragged


@pytest.mark.parametrize("family", FAST)
def test_onnxruntime_computes_what_pytorch_computes(family: str) -> None:
    done = exported(family)
    assert_parity(done, 1e-4)
    assert {case.name for case in done.cases} >= {"prefix", "no prefix", "mixed", "random prefix"}


@torch.no_grad()
@pytest.mark.parametrize("family", FAST)
def test_logits_against_an_oracle_that_the_exporter_does_not_know(family: str) -> None:
    runtime, loaded = Runtime(read_report(exported(family).folder), device="cpu"), load_backbone(backbone(family))
    prefix = random_prefix(loaded.identity)
    rows, given = prompts(), [prefix, None, prefix]
    logits = runtime.start([served(one, runtime.dtype) if one else None for one in given]).feed(
        [r.tolist() for r in rows]
    )
    for row, (text, one) in enumerate(zip(rows, given, strict=True)):
        found = torch.from_numpy(logits[row, -len(text) :])
        expected = alone(loaded.model, text, key_value_prefix(one) if one else None)
        other = alone(loaded.model, text, None if one else key_value_prefix(prefix))
        assert (found - expected).abs().max() <= 1e-4
        assert (found - other).abs().max() > EFFECT


def test_half_precision_and_weights_in_the_checkpoint(tmp_path: Path) -> None:
    load_backbone(backbone("llama"), dtype="float16").model.save_pretrained(tmp_path / "half")
    loaded = load_backbone(tmp_path / "half", dtype="float16")
    done = export_onnx(
        random_prefix(loaded.identity), loaded, tmp_path / "served", dtype="float16", weights="checkpoint"
    )
    assert_parity(done, 5e-3)
    assert all(case.pytorch_difference and 5e-3 <= case.tolerance < 1e-2 for case in done.cases)
    places = {entry.value for tensor in graph_of(done).graph.initializer for entry in tensor.external_data}
    assert "model.safetensors" in places
    assert "model.onnx.data" not in places
    assert not (done.folder / "onnx" / "model.onnx.data").exists()
    assert {value.type.tensor_type.elem_type for value in graph_of(done).graph.output[1:]} == {TensorProto.FLOAT16}


def test_baked_graph_is_an_ordinary_decoder_with_the_prefix_inside() -> None:
    done = exported("mistral_window", baked=True)
    assert_parity(done, 1e-4)
    assert not (done.folder / "prefix.safetensors").exists()
    report = json.loads((done.folder / "export.json").read_text())
    assert report["prefix"]["baked"] is True
    assert report["contract"]["past"] == "the text so far"


def test_names_and_dimensions_are_those_of_optimum() -> None:
    graph = graph_of(exported("llama")).graph
    inputs = {value.name: dimensions(value) for value in graph.input}
    outputs = {value.name: dimensions(value) for value in graph.output}
    past, present = ["batch_size", 2, "past_sequence_length", 16], ["batch_size", 2, "total_sequence_length", 16]
    layers = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{name}": past for name in layers},
    }
    assert outputs == {
        "logits": ["batch_size", "sequence_length", 320],
        **{f"present.{name}": present for name in layers},
    }


@pytest.mark.parametrize("family", FAST)
def test_graph_is_portable_and_tells_nothing_of_this_machine(family: str) -> None:
    done = exported(family)
    model = graph_of(done)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert not model.metadata_props
    assert not model.functions
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path.cwd()).encode() not in (done.folder / "onnx" / "model.onnx").read_bytes()
    onnx.checker.check_model(done.folder / "onnx" / "model.onnx")


def test_every_weight_is_stored_once() -> None:
    done = exported("gpt2")
    parameters = {id(p): p.numel() for p in load_backbone(backbone("gpt2")).model.parameters()}
    stored = (done.folder / "onnx" / "model.onnx.data").stat().st_size
    assert 4 * sum(parameters.values()) * 0.98 <= stored <= 4 * sum(parameters.values())


def test_folder_has_what_serving_needs_and_the_report() -> None:
    done = exported("llama")
    names = {str(path.relative_to(done.folder)) for path in done.folder.rglob("*") if path.is_file()}
    assert names >= {"onnx/model.onnx", "onnx/model.onnx.data", "prefix.safetensors", "export.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"}
    report = json.loads((done.folder / "export.json").read_text())
    assert report["version"] == 1
    assert report["backbone"]["weights_hash"].startswith("b3t-v1:")
    assert report["model"]["decoder"]["num_key_value_heads"] == 2
    assert report["graph"]["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert [case["name"] for case in report["parity"]] == [case.name for case in done.cases]
    assert report["prefix"]["manifest"]["content"] == load(done.folder / "prefix.safetensors").manifest.content
    assert done.bytes == sum(path.stat().st_size for path in done.folder.rglob("*") if path.is_file())


@pytest.fixture
def traced_before(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Llama's backbone, with tracing replaced by the graph that another test has traced."""
    path = exported("llama").folder / "onnx" / "model.onnx"
    monkeypatch.setattr(subject, "trace", lambda *_: ir.external_data.load_to_model(ir.load(path)))
    return backbone("llama")


def test_a_bare_backbone_takes_any_prefix_later(traced_before: Path, tmp_path: Path) -> None:
    done = export_onnx(None, traced_before, tmp_path / "bare")
    assert not (tmp_path / "bare" / "prefix.safetensors").exists()
    assert json.loads((tmp_path / "bare" / "export.json").read_text())["prefix"] is None
    assert_parity(done, 1e-4)


def test_inline_weights_leave_one_file(traced_before: Path, tmp_path: Path) -> None:
    done = export_onnx(None, traced_before, tmp_path / "inline", weights="inline")
    assert [path.name for path in (tmp_path / "inline" / "onnx").iterdir()] == ["model.onnx"]
    assert_parity(done, 1e-4)


def test_checkpoint_of_links_as_the_hub_cache_has_them(traced_before: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for file in traced_before.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    done = export_onnx(None, tmp_path / "snapshot", tmp_path / "served", weights="checkpoint")
    weights = done.folder / "onnx" / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.read_bytes() == (traced_before / "model.safetensors").read_bytes()
    assert_parity(done, 1e-4)


def test_a_prefix_that_leaves_one_token_of_context_is_verified_with_it(traced_before: Path, tmp_path: Path) -> None:
    loaded = load_backbone(traced_before)
    done = export_onnx(random_prefix(loaded.identity, length=127), loaded, tmp_path / "served")
    assert {case.rows for case in done.cases} == {(1,), (1, 1, 1, 1)}


def drop_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Runtime.start
    monkeypatch.setattr(Runtime, "start", lambda self, prefixes: start(self, [None] * len(prefixes)))


def test_a_dropped_prefix_fails_and_leaves_nothing(
    traced_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_backbone(traced_before)
    drop_prefixes(monkeypatch)
    with pytest.raises(ParityError, match=r"case 'prefix': expected logits of onnxruntime within 1.0e-04"):
        export_onnx(random_prefix(loaded.identity), loaded, tmp_path / "served")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_float16_of_large_logits_passes_and_a_dropped_prefix_does_not(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_backbone(backbone("gpt2"), dtype="float16")
    with torch.no_grad():
        loaded.model.transformer.ln_f.weight.mul_(scale)
    prefix = random_prefix(loaded.identity)
    done = export_onnx(prefix, loaded, tmp_path / "served", dtype="float16")
    for case in done.cases:
        assert case.pytorch_difference is not None
        assert 5e-3 <= case.tolerance <= max(5e-3, 3 * case.pytorch_difference)
        assert case.max_abs_difference <= case.tolerance
    path = done.folder / "onnx" / "model.onnx"
    monkeypatch.setattr(subject, "trace", lambda *_: ir.external_data.load_to_model(ir.load(path)))
    drop_prefixes(monkeypatch)
    with pytest.raises(ParityError, match=r"case 'prefix': .*; export with --dtype float32: PyTorch's own float16"):
        export_onnx(prefix, loaded, tmp_path / "again", dtype="float16")


@pytest.mark.parametrize(
    ("dtype", "largest", "own", "accepted"),
    [
        ("float32", 20.0, None, 1e-4),
        ("float32", 1000.0, None, 5 * 2**-23 * 1000),
        ("float16", 1.0, 1e-3, 5e-3),
        ("float16", 20.0, 0.03, 0.09),
        ("float16", 20.0, float("inf"), 0.4),
    ],
)
def test_what_difference_is_accepted(dtype: str, largest: float, own: float | None, accepted: float) -> None:
    assert tolerance(dtype, largest, own) == pytest.approx(accepted)


def test_a_failed_export_keeps_the_folder_that_was_there(
    traced_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(None, traced_before, tmp_path / "served")
    before = (tmp_path / "served" / "export.json").read_bytes()
    drop_prefixes(monkeypatch)
    with pytest.raises(ParityError):
        export_onnx(None, traced_before, tmp_path / "served")
    assert (tmp_path / "served" / "export.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_somebody_elses_folder_is_not_replaced(traced_before: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("Dear mother")
    with pytest.raises(InputError, match=r"an empty folder, a new one or one with export.json"):
        export_onnx(None, traced_before, tmp_path / "letters")
    assert (tmp_path / "letters" / "mother.txt").read_text() == "Dear mother"


def test_prefix_for_other_weights_is_refused_unless_allowed(traced_before: Path, tmp_path: Path) -> None:
    other = random_prefix(load_backbone(backbone("llama", 1)).identity)
    with pytest.raises(MismatchError, match="weights hash"):
        export_onnx(other, traced_before, tmp_path / "served")
    done = export_onnx(other, traced_before, tmp_path / "served", allow_mismatch=True)
    assert_parity(done, 1e-4)


def test_checkpoint_weights_of_another_dtype_are_refused(tmp_path: Path, traced_before: Path) -> None:
    load_backbone(traced_before, dtype="float16").model.save_pretrained(tmp_path / "half")
    with pytest.raises(ConfigError, match=r"--weights checkpoint: expected weights stored in the dtype.*found F16"):
        export_onnx(None, tmp_path / "half", tmp_path / "served", weights="checkpoint")
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "--dtype: expected float32 or float16; found 'bfloat16'"),
        ({"weights": "elsewhere"}, "--weights: expected external, checkpoint, inline; found 'elsewhere'"),
        ({"baked": True}, "--baked: expected a prefix to bake; found none"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(None, "no-such-folder", tmp_path / "served", **options)


def test_prefix_file_is_taken_as_well_as_a_loaded_one(traced_before: Path, tmp_path: Path) -> None:
    save(random_prefix(load_backbone(traced_before).identity), tmp_path / "prefix.safetensors")
    export_onnx(tmp_path / "prefix.safetensors", traced_before, tmp_path / "served")
    assert load(tmp_path / "served" / "prefix.safetensors").manifest.injections[0].length == LENGTH


def test_prefix_as_long_as_the_context_is_refused(traced_before: Path, tmp_path: Path) -> None:
    loaded = load_backbone(traced_before)
    with pytest.raises(InputError, match="room for text in the context; found a prefix that leaves none of its 128"):
        export_onnx(random_prefix(loaded.identity, length=128), loaded, tmp_path / "served")
