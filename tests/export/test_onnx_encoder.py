"""The exported folder of a model that reads: states and logits that PyTorch computes, or nothing at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import prefixkit.export.onnx as driver
from prefixkit.backbones.heads import read
from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.errors import BackboneError, ConfigError, InputError, MismatchError, ParityError
from prefixkit.export.onnx import Exported, export_onnx
from prefixkit.injections import KeyValuePrefix, TaskHead, part_of, parts_of
from prefixkit.prefix import load, save
from prefixkit.serving.reader import Reader
from prefixkit.serving.reader_rows import ServedReading
from prefixkit.serving.session import Session
from prefixkit.task import load_tokenizer
from tests.exported import exported, pair_backbone
from tests.exported_readers import (
    exported_reader,
    file_of,
    load_reading,
    reading_folder,
    received,
    retraced,
)

# Every family once, and every kind of injection once; pytest -m matrix has them all.
CELLS = [
    ("bert", "prompt slots, add slots"),
    ("roberta", "kv, head first"),
    ("electra", "replace, head mean"),
    ("distilbert", "prompt prepend, head each"),
    ("vit", "prompt after_first, head first"),
    ("deit", "add after_first, head mean"),
    ("dinov2", "kv, delta, head last"),
    ("gpt2", "kv, head last"),
]
TOLERANCE, EFFECT = 1e-4, 0.1
TEXTS = [[5, 6, 7, 8, 9, 10], [40], [20, 21, 22]]


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: "-".join(cell).replace(" ", "_"))
def done(request: pytest.FixtureRequest) -> Exported:
    return exported_reader(*request.param)


def graph_of(done: Exported) -> onnx.GraphProto:
    return onnx.load(done.folder / "onnx" / "model.onnx", load_external_data=False).graph


def dimensions(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_onnxruntime_computes_what_pytorch_computes(done: Exported) -> None:
    for case in done.cases:
        assert case.max_abs_difference <= TOLERANCE, case
        assert case.effect is None or case.effect > EFFECT, case
    assert {case.name for case in done.cases} >= {"prefix", "random prefix", "no prefix", "mixed"}
    assert all(case.effect is not None for case in done.cases if case.name != "no prefix" and "one" not in case.name)


def test_graph_is_portable_and_tells_nothing_of_this_machine(done: Exported) -> None:
    path = done.folder / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert str(Path.cwd()).encode() not in path.read_bytes()
    onnx.checker.check_model(path)


@torch.no_grad()
def test_states_against_a_cache_that_the_exporter_does_not_know() -> None:
    """RoBERTa takes a cache for its past, as transformers has it."""
    done, model = exported_reader("roberta", "kv, head first"), load_reading("roberta")
    prefix, head = (part_of(received(model, "kv, head first"), kind) for kind in (KeyValuePrefix, TaskHead))
    assert isinstance(prefix, KeyValuePrefix)
    assert isinstance(head, TaskHead)
    reader = Reader(done.folder, device="cpu")
    found = reader.read(TEXTS, [reader.own, None, reader.own])
    assert found.logits is not None
    for index, (text, given) in enumerate(zip(TEXTS, [prefix, None, prefix], strict=True)):
        states = through_cache(model.release(), text, given)
        assert np.abs(found.states[index, : len(text)] - states.numpy()).max() <= TOLERANCE
        logits = F.linear(states[0], head.weight, head.bias)
        assert np.abs(found.logits[index] - logits.numpy()).max() <= TOLERANCE


def through_cache(model: Any, text: list[int], prefix: KeyValuePrefix | None) -> Tensor:
    """[seq, hidden]: the final states of RoBERTa, whose text begins at position 2."""
    cache, length = DynamicCache(), 0 if prefix is None else prefix.length
    for layer in range(2 if prefix is not None else 0):
        assert prefix is not None
        cache.update(prefix.keys[layer][None], prefix.values[layer][None], layer)
    start = 2 + (prefix.positions.text_start if prefix is not None else 0)
    # Types are all 0: no separator is among the texts.
    ids = torch.tensor([text])
    states: Tensor = model.roberta(
        input_ids=ids,
        attention_mask=torch.ones(1, length + len(text), dtype=torch.long),
        position_ids=torch.arange(start, start + len(text))[None],
        token_type_ids=torch.zeros_like(ids),
        past_key_values=cache if prefix is not None else None,
    ).last_hidden_state
    return states[0]


@torch.no_grad()
def test_rows_of_one_batch_have_prefixes_of_different_length() -> None:
    """Many prefixes on one graph: another file's, a longer one, none."""
    model, reader = load_reading("roberta"), Reader(exported_reader("roberta", "kv, head first").folder, device="cpu")
    others = [received(model, "kv, head first", seed=2), received(model, "kv, head first", seed=3, length=9)]
    served = [reader.reading(file_of(model, other)) for other in others]
    found = reader.read(TEXTS, [served[0], served[1], None])
    head = part_of(others[0], TaskHead)
    assert head is not None
    assert found.logits is not None
    for index, (text, given) in enumerate(zip(TEXTS, [*others, None], strict=True)):
        inputs = {"input_ids": torch.tensor([text]), "attention_mask": torch.ones(1, len(text), dtype=torch.long)}
        states = model.states(inputs, given)
        assert np.abs(found.states[index, : len(text)] - states[0].numpy()).max() <= TOLERANCE
        assert np.abs(found.logits[index] - read(head, states)[0].numpy()).max() <= TOLERANCE


def test_names_and_dimensions_are_those_of_optimum() -> None:
    graph = graph_of(exported_reader("roberta", "kv, head first"))
    past = ["batch_size", 4, "prefix_length", 16]
    assert {value.name: dimensions(value) for value in graph.input} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "token_type_ids": ["batch_size", "sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "head.weight": ["labels", 64],
        "head.bias": ["labels"],
        **{f"past_key_values.{layer}.{kind}": past for layer in range(2) for kind in ("key", "value")},
    }
    assert {value.name: dimensions(value) for value in graph.output} == {
        "last_hidden_state": ["batch_size", "sequence_length", 64],
        "logits": ["batch_size", "labels"],
    }


def test_images_and_prompts_are_inputs_and_words_are_logits() -> None:
    image = {value.name: dimensions(value) for value in graph_of(exported_reader(*CELLS[4])).input}
    assert image["pixel_values"] == ["batch_size", 3, 16, 16]
    assert image["prefix_attention_mask"] == ["batch_size", "prefix_and_prompt_length"]
    assert image["prompt_embeddings"] == ["batch_size", "prompt_length", 64]
    cloze = graph_of(exported_reader(*CELLS[0]))
    assert {value.name: dimensions(value) for value in cloze.output}["logits"][2] == load_reading(
        "bert"
    ).identity.vocab_size
    assert dimensions(next(value for value in cloze.input if value.name == "hidden_prompts"))[1:3] == [2, "places"]


def test_folder_says_what_it_is() -> None:
    done = exported_reader("vit", "prompt after_first, head first")
    names = {str(path.relative_to(done.folder)) for path in done.folder.rglob("*") if path.is_file()}
    assert names == {
        *("onnx/model.onnx", "onnx/model.onnx.data", "prefix.safetensors", "export.json"),
        *("config.json", "preprocessor_config.json"),
    }
    report = json.loads((done.folder / "export.json").read_text())
    assert report["reader"]["placement"] == "after_first"
    assert report["reader"]["head"] == "first"
    assert set(report["contract"]) >= {"pixel_values", "prefix_attention_mask", "prompt_embeddings", "logits", "past"}
    assert [case["name"] for case in report["parity"]] == [case.name for case in done.cases]


def test_hidden_prompts_that_begin_anew_in_every_layer_are_folded() -> None:
    done = exported_reader("electra", "replace, head mean")
    stored = load(done.folder / "prefix.safetensors").manifest
    assert [record.kind for record in stored.injections] == ["key_value_prefix", "task_head"]
    assert "hidden_prompts" not in {value.name for value in graph_of(done).input}


@pytest.fixture
def traced_before(monkeypatch: pytest.MonkeyPatch) -> Path:
    return retraced(monkeypatch, "roberta", "kv, head first")


def without(served: ServedReading, part: str) -> ServedReading:
    """`served` with zeros for a head, and nothing for a prefix."""
    if part == "prefix":
        return replace(served, prefix=None)
    assert served.head is not None
    return replace(served, head=(served.head[0] * 0, served.head[1]))


@pytest.mark.parametrize("part", ["prefix", "head"])
def test_what_is_dropped_fails_and_leaves_nothing(
    traced_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    model, reading = load_reading("roberta"), Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda self, rows, given: reading(self, rows, [without(one, part) for one in given])
    )
    file = file_of(model, received(model, "kv, head first"))
    with pytest.raises(ParityError, match=r"case 'prefix': expected logits of onnxruntime within 1.0e-04"):
        export_onnx(file, model, tmp_path / "served")
    assert list(tmp_path.iterdir()) == []


def test_dropped_deltas_fail_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(driver, "written_into", nothing)
    model = load_reading("dinov2")
    with pytest.raises(ParityError, match="case 'prefix'"):
        export_onnx(file_of(model, received(model, "delta, head first")), model, tmp_path / "served")
    assert list(tmp_path.iterdir()) == []


def test_deltas_change_the_graph_and_never_the_checkpoint(tmp_path: Path) -> None:
    """Also beside a checkpoint whose other weights the graph takes: the changed ones are written beside it."""
    folder, model = reading_folder("vit"), load_reading("vit")
    before, weights = (folder / "model.safetensors").read_bytes(), {k: v.clone() for k, v in named(model)}
    file = file_of(model, received(model, "delta, head first"))
    done = export_onnx(file, model, tmp_path / "served", weights="checkpoint")
    assert (folder / "model.safetensors").read_bytes() == before
    assert (done.folder / "onnx" / "model.safetensors").read_bytes() == before
    assert all(torch.equal(weight, weights[name]) for name, weight in named(model))
    places = {entry.value for tensor in graph_of(done).initializer for entry in tensor.external_data}
    assert places >= {"model.safetensors", "model.onnx.data"}
    report = json.loads((done.folder / "export.json").read_text())
    assert report["reader"]["deltas"] == sorted(model.parameter_shapes("bias"))
    with pytest.raises(InputError, match="expected what this graph has inputs for; found parameter_delta"):
        Reader(done.folder).reading(file_of(model, received(model, "kv, head first")))


def named(model: Any) -> list[tuple[str, Tensor]]:
    return list(model.model.named_parameters())


def test_deltas_of_a_decoder_that_writes_are_inside_its_graph(tmp_path: Path) -> None:
    model = load_backbone(reading_folder("gpt2"))
    injection = received(model, "delta, prompt prepend")  # type: ignore[arg-type]
    done = export_onnx(file_of(model, injection), model, tmp_path / "served")  # type: ignore[arg-type]
    assert done.max_abs_difference <= TOLERANCE
    assert all(case.effect is not None and case.effect > EFFECT for case in done.cases)
    assert not (done.folder / "prefix.safetensors").exists()
    tokenizer = load_tokenizer(model.folder)
    ids = tokenizer.encode_text("name : blue")
    expected = model.generate([ids], injection, stop=(), max_new_tokens=6)
    assert [list(Session(done.folder).generate(["name : blue"], max_new_tokens=6)[0].token_ids)] == expected
    assert model.generate([ids], None, stop=(), max_new_tokens=6) != expected


def test_a_bare_encoder_takes_prefixes_later(tmp_path: Path) -> None:
    done = export_onnx(None, reading_folder("electra"), tmp_path / "bare")
    assert done.max_abs_difference <= TOLERANCE
    assert json.loads((done.folder / "export.json").read_text())["prefix"] is None
    model, reader = load_reading("electra"), Reader(done.folder, device="cpu")
    given = received(model, "kv")
    found = reader.read(TEXTS[:1], [reader.reading(file_of(model, given))])
    inputs = {"input_ids": torch.tensor(TEXTS[:1]), "attention_mask": torch.ones(1, len(TEXTS[0]), dtype=torch.long)}
    labels = torch.zeros_like(inputs["input_ids"])
    expected = model.target_logits(inputs["input_ids"], inputs["attention_mask"], labels, given)
    assert found.logits is not None
    assert np.abs(found.logits[0] - expected.numpy()).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baked": True}, "--baked: expected a decoder that writes; found a model that reads"),
        ({"dtype": "float16"}, "--dtype: expected float32 for a model that reads; found float16"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = file_of(load_reading("roberta"), received(load_reading("roberta"), "kv, head first"))
    with pytest.raises(ConfigError, match=message):
        export_onnx(file, "no-such-folder", tmp_path / "served", **options)


@pytest.mark.parametrize("kind", ["prompt slots", "add prepend"])
def test_prompts_that_no_past_is_are_refused_for_writers(kind: str, tmp_path: Path) -> None:
    model = load_reading("gpt2")
    injection = received(model, kind)
    parts = tuple(replace(part, stack="decoder") for part in parts_of(injection))  # type: ignore[type-var]
    with pytest.raises(InputError, match=r"a prompt before the text, for a decoder that writes; found .*_prompt"):
        export_onnx(file_of(model, parts[0]), "no-such-folder", tmp_path / "served")


def test_files_that_do_not_fit_are_refused(traced_before: Path, tmp_path: Path) -> None:
    model, other = load_reading("roberta"), load_reading("bert")
    file = file_of(model, received(model, "kv, head first"))
    with pytest.raises(MismatchError):
        export_onnx(file, other, tmp_path / "served")
    with pytest.raises(BackboneError, match="an encoder or a decoder"):
        export_onnx(file, pair_backbone("bart"), tmp_path / "served")
    reader = Reader(exported_reader("roberta", "kv, head first").folder)
    with pytest.raises(InputError, match=r"found embedding_prompt \(after_first\)"):
        reader.reading(file_of(model, received(model, "prompt after_first, head first")))
    with pytest.raises(InputError, match=r"found task_head \(last\)"):
        reader.reading(file_of(model, received(model, "kv, head last")))
    with pytest.raises(MismatchError):
        reader.reading(file_of(other, received(other, "kv, head first")))


def test_generate_and_reader_send_each_other_what_is_not_theirs(capfd: pytest.CaptureFixture[str]) -> None:
    folder = exported_reader("roberta", "kv, head first").folder
    assert run(["generate", str(folder), "--prompt", "blue"]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert "expected a model that writes; found one that reads" in told
    with pytest.raises(ConfigError, match="expected a graph that reads; found one that writes"):
        Reader(exported("gpt2").folder)


def test_rows_that_cannot_be_read_are_refused(traced_before: Path) -> None:
    reader = Reader(exported_reader("roberta", "kv, head first").folder)
    for rows, given, message in (
        ([], [], "expected as many rows as of what they receive, at least one; found 0 and 0"),
        ([[5, 6]], [], "found 1 and 0"),
        ([[]], [reader.own], "row 0: expected tokens, 0 of them slots"),
        ([[5, -1]], [reader.own], "row 0: expected tokens, 0 of them slots .*; found 2 tokens with 1 slots"),
        ([[5, 10**6]], [reader.own], "row 0: expected token ids below 320; found 1000000"),
        (np.zeros((1, 3, 8, 8)), [reader.own], "batch: expected token ids of each row; found images"),
    ):
        with pytest.raises(InputError, match=message):
            reader.read(rows, given)


def test_command_says_what_to_do_next(traced_before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_reading("roberta")
    save(file_of(model, received(model, "kv, head first")), tmp_path / "file.safetensors")
    asked = [str(tmp_path / "file.safetensors"), "--backbone", str(traced_before), "-o", str(tmp_path / "served")]
    assert run(["export", "--onnx", *asked]) == 0
    assert f'next: prefixkit.serving.reader.Reader("{tmp_path / "served"}") in Python' in capfd.readouterr().out
