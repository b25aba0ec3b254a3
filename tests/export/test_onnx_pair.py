"""The exported folder of an encoder-decoder: two graphs that compute what PyTorch computes, or nothing at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

import prefixkit.export.pair as subject
from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.errors import BackboneError, ConfigError, InputError, MismatchError, ParityError
from prefixkit.export.onnx import Exported, export_onnx
from prefixkit.export.pair_report import DECODER, ENCODER
from prefixkit.format.manifest import Positions
from prefixkit.format.names import ATTENTIONS
from prefixkit.injections import EmbeddingPrompt, KeyValuePrefixes
from prefixkit.prefix import Prefix, save
from prefixkit.serving import pair_runtime
from prefixkit.serving.pair_prefix import ServedPrefixes
from prefixkit.serving.pair_runtime import PairRuntime
from prefixkit.serving.prefix_table import ServedPrefix
from prefixkit.serving.report import read_report
from prefixkit.serving.session import Session
from prefixkit.task import encode_prompt, load_tokenizer
from tests.encoder_decoders import END, oracle, random_prefixes
from tests.exported import (
    backbone,
    exported_pair,
    load_pair,
    pair_backbone,
    random_pair_prefix,
    random_prefix,
)

# T5 with one stack deeper than the other and tied weights is T5 enough; pytest -m matrix has them all.
FAMILIES = ["bart", "flan", "t5_uneven"]
PLACES = [".".join(place) for place in ATTENTIONS]
EFFECT = 0.1
SOURCES = [[5, 6, 7, 8, 9, 10, 11], [40], [20, 21, 22, END], [12, 13, 14], [50, 51, 52, 53, 54]]
TARGETS = [[END, 6, 7], [0, 9, 9, 9, 8, 3, 4, 6], [5], [0, 30, 31, 32], [END, 17]]


def graphs_of(done: Exported) -> dict[str, ir.Model]:
    return {file: ir.external_data.load_to_model(ir.load(done.folder / file)) for file in (ENCODER, DECODER)}


@pytest.fixture
def traced_before(monkeypatch: pytest.MonkeyPatch) -> Path:
    """BART's folder, with tracing replaced by the graphs that another test has traced."""
    exported = exported_pair("bart")  # now: it traces as well, where no other test has come first
    monkeypatch.setattr(subject, "trace_pair", lambda *_: graphs_of(exported))
    return pair_backbone("bart")


def assert_parity(done: Exported) -> None:
    for case in done.cases:
        assert case.max_abs_difference <= 1e-4, case
        assert case.effect is None or case.effect > EFFECT, case
    assert any(len(set(case.rows)) > 1 for case in done.cases)  # ragged


@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_computes_what_pytorch_computes(family: str) -> None:
    done = exported_pair(family)
    assert_parity(done)
    names = {case.name for case in done.cases if case.effect is not None}
    assert names == {"prefix", "prefix, one row", "mixed", *(f"random {place}" for place in PLACES)}
    assert {case.name for case in done.cases} - names == {"no prefix", "no prefix, one row"}


def served(prefixes: KeyValuePrefixes | None) -> ServedPrefixes | None:
    if prefixes is None:
        return None
    parts = {}
    for part in prefixes.parts:
        pairs = zip(part.keys, part.values, strict=True)
        parts[part.place] = ServedPrefix(tuple(one.numpy() for pair in pairs for one in pair), part.length, 0, None)
    return ServedPrefixes(parts, None)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_against_attention_by_hand_in_one_batch_of_different_prefixes(family: str) -> None:
    loaded, runtime = load_pair(family), PairRuntime(read_report(exported_pair(family).folder), device="cpu")
    given = [
        random_prefixes(loaded, 6),
        None,
        random_prefixes(loaded, 2, (("encoder", "self"), ("decoder", "cross"))),
        random_prefixes(loaded, 0),
        random_prefixes(loaded, 9, (("decoder", "self"),)),
    ]
    batch = runtime.start([served(one) for one in given], SOURCES)
    first, last = batch.feed([row[:-1] for row in TARGETS]), batch.feed([row[-1:] for row in TARGETS])
    for row, (source, target, one) in enumerate(zip(SOURCES, TARGETS, given, strict=True)):
        found = torch.cat(
            [torch.from_numpy(first[row, first.shape[1] - len(target) + 1 :]), torch.from_numpy(last[row])]
        )
        texts = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([target])}
        expected, bare = (oracle(loaded.release(), one_or_none)(**texts).logits[0] for one_or_none in (one, None))
        assert (found - expected).abs().max() <= 1e-4
        if one is not None and one.length:
            assert (found - bare).abs().max() > EFFECT


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_the_backbone(family: str) -> None:
    loaded, session = load_pair(family), Session(exported_pair(family).folder, device="cpu")
    prefix, prompts = random_pair_prefix(loaded), ["name : Blue", "a", "the blue one is cheap"]
    tokenizer = load_tokenizer(loaded.folder)
    task = prefix.manifest.task
    assert task is not None
    sources = [encode_prompt(task, tokenizer, {"input": prompt}) for prompt in prompts]
    assert all(source[-1] == END for source in sources)
    random = random_prefixes(loaded)
    stop, alone = [tokenizer.eos_id or 0], []
    for source, received in zip(sources, (random, None, random), strict=True):
        alone += loaded.generate([source], received, stop=stop, max_new_tokens=12)
    written = session.generate(prompts, ["own", None, "own"], max_new_tokens=12)
    assert [list(row.token_ids) for row in written] == alone
    assert any(len(row) == 12 for row in alone)
    bare = session.generate(prompts, None, max_new_tokens=12)
    assert bare[0].token_ids != written[0].token_ids


def dimensions(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def signature(done: Exported, file: str) -> tuple[dict[str, list[str | int]], dict[str, list[str | int]]]:
    model = onnx.load(done.folder / file, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    onnx.checker.check_model(done.folder / file)
    inputs, outputs = model.graph.input, model.graph.output
    return {one.name: dimensions(one) for one in inputs}, {one.name: dimensions(one) for one in outputs}


def test_names_and_dimensions_are_those_of_optimum_and_of_prefixes() -> None:
    done = exported_pair("t5_uneven")
    kinds = ("key", "value")

    def cache(length: str) -> list[str | int]:
        return ["batch_size", 4, length, 16]

    inputs, outputs = signature(done, ENCODER)
    assert inputs == {
        "input_ids": ["batch_size", "encoder_sequence_length"],
        "attention_mask": ["batch_size", "encoder_total_length"],
        **{f"prefix_key_values.{n}.encoder.{kind}": cache("encoder_prefix_length") for n in range(3) for kind in kinds},
    }
    assert outputs == {
        "last_hidden_state": ["batch_size", "encoder_sequence_length", 64],
        **{f"present.{n}.encoder.{kind}": cache("encoder_sequence_length") for n in range(2) for kind in kinds},
    }
    inputs, outputs = signature(done, DECODER)
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "encoder_attention_mask": ["batch_size", "cross_length"],
        "prefix_length": [],
        **{f"past_key_values.{n}.decoder.{kind}": cache("past_sequence_length") for n in range(2) for kind in kinds},
        **{f"past_key_values.{n}.encoder.{kind}": cache("cross_length") for n in range(2) for kind in kinds},
    }
    assert outputs == {
        "logits": ["batch_size", "sequence_length", 320],
        **{f"present.{n}.decoder.{kind}": cache("total_sequence_length") for n in range(2) for kind in kinds},
    }


def test_folder_has_what_serving_needs_and_the_report() -> None:
    done = exported_pair("flan")
    names = {str(path.relative_to(done.folder)) for path in done.folder.rglob("*") if path.is_file()}
    graphs = {file + end for file in (ENCODER, DECODER) for end in ("", ".data")}
    assert names >= {*graphs, "prefix.safetensors", "export.json", "config.json", "tokenizer.json"}
    report = json.loads((done.folder / "export.json").read_text())
    assert report["graph"]["file"] == DECODER
    assert {entry["file"] for entry in report["graph"]["files"]} == graphs
    assert report["encoder"]["inputs"]["prefix_key_names"] == "prefix_key_values.%d.encoder.key"
    assert report["encoder"]["decoder_start_token_id"] == 0
    assert report["model"]["encoder"]["num_hidden_layers"] == 2
    assert [case["name"] for case in report["parity"]] == [case.name for case in done.cases]


def test_each_graph_has_only_the_weights_that_it_uses() -> None:
    loaded, done = load_pair("t5_uneven"), exported_pair("t5_uneven")
    model = loaded.release()
    cross = sum(w.numel() for name, w in model.decoder.named_parameters() if "EncDecAttention.k" in name) * 2
    encoder = sum(weight.numel() for weight in model.encoder.parameters()) + cross
    stored = (done.folder / f"{ENCODER}.data").stat().st_size
    assert 4 * encoder * 0.98 <= stored <= 4 * encoder


def test_weights_stay_in_the_checkpoint(traced_before: Path, tmp_path: Path) -> None:
    done = export_onnx(None, traced_before, tmp_path / "served", weights="checkpoint")
    assert_parity(done)
    for file in (ENCODER, DECODER):
        graph = onnx.load(done.folder / file, load_external_data=False).graph
        places = {entry.value for tensor in graph.initializer for entry in tensor.external_data}
        assert "model.safetensors" in places
    copied, stored = done.folder / "onnx" / "model.safetensors", traced_before / "model.safetensors"
    assert copied.read_bytes() == stored.read_bytes()


def test_a_bare_backbone_takes_any_prefix_later(traced_before: Path, tmp_path: Path) -> None:
    done = export_onnx(None, traced_before, tmp_path / "bare", weights="inline")
    assert {path.name for path in (done.folder / "onnx").iterdir()} == {"encoder_model.onnx", "decoder_model.onnx"}
    session = Session(done.folder, device="cpu")
    session.add_prefix("mine", random_pair_prefix(load_pair("bart"), places=(("decoder", "cross"),)))
    with_it, without = session.generate(["a blue"] * 2, ["mine", None], max_new_tokens=8)
    assert with_it.token_ids != without.token_ids


@pytest.mark.parametrize("place", PLACES)
def test_a_dropped_prefix_fails_and_leaves_nothing(
    traced_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    whole = pair_runtime.part
    monkeypatch.setattr(
        pair_runtime, "part", lambda given, where: whole([None] * len(given) if where == place else given, where)
    )
    loaded = load_pair("bart")
    with pytest.raises(ParityError, match=r"case 'prefix': expected logits of onnxruntime within 1.0e-04"):
        export_onnx(random_pair_prefix(loaded), loaded, tmp_path / "served")
    assert list(tmp_path.iterdir()) == []


def test_a_prefix_that_counts_as_text_fails(
    traced_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start: Callable[..., pair_runtime.PairDecoding] = PairRuntime.start

    def forgetful(*arguments: object) -> pair_runtime.PairDecoding:
        made = start(*arguments)
        made.prefix_length = 0
        return made

    monkeypatch.setattr(PairRuntime, "start", forgetful)
    with pytest.raises(ParityError, match=r"case 'random decoder\.self'"):
        export_onnx(None, traced_before, tmp_path / "served")


def test_what_bart_writes_first_is_no_text() -> None:
    session = Session(exported_pair("bart").folder, device="cpu")
    assert session.tokenizer.bos_id == 1
    task = session.prefixes["own"].task
    assert task is not None
    assert task.target_template == "<s>{target}"
    (row,) = session.generate(["name : Blue"], max_new_tokens=12)
    kept = [token for token in row.token_ids if token != 1]
    assert row.text == session.tokenizer.decode(kept).strip()


def test_a_source_longer_than_the_context_is_refused(traced_before: Path, tmp_path: Path) -> None:
    session = Session(export_onnx(None, traced_before, tmp_path / "bare").folder, device="cpu")
    with pytest.raises(InputError, match="prompt 1: expected at most 128 tokens, the context; found"):
        session.generate(["a b c d e f g h " * 30])


def test_prefix_for_a_decoder_is_not_taken(tmp_path: Path) -> None:
    session = Session(exported_pair("bart").folder, device="cpu")
    with pytest.raises(MismatchError):
        session.add_prefix("other", random_prefix(load_backbone(backbone("gpt2")).identity))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "--dtype: expected float32 for an encoder-decoder; found float16"),
        ({"baked": True}, "--baked: expected a decoder; found an encoder-decoder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(options: dict, message: str, tmp_path: Path) -> None:
    prefix = random_pair_prefix(load_pair("bart"))
    with pytest.raises(ConfigError, match=message):
        export_onnx(prefix, "no-such-folder", tmp_path / "served", **options)


def test_a_prompt_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    prompt = EmbeddingPrompt(embeddings=torch.ones(4, 64), positions=Positions(text_start=4), stack="encoder")
    manifest = replace(random_pair_prefix(load_pair("bart")).manifest, injections=(prompt.record(),))
    with pytest.raises(InputError, match="expected keys and values for an encoder-decoder; found embedding_prompt"):
        export_onnx(Prefix(manifest, prompt.arrays()), "no-such-folder", tmp_path / "served")


def test_a_prefix_for_another_kind_of_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="expected an encoder-decoder, as the prefix is for one; found a model of"):
        export_onnx(random_pair_prefix(load_pair("bart")), backbone("gpt2"), tmp_path / "served")
    with pytest.raises(MismatchError, match="weights hash"):
        export_onnx(random_pair_prefix(load_pair("bart", 1)), load_pair("bart"), tmp_path / "served")
    assert list(tmp_path.iterdir()) == []


def test_on_the_command_line(traced_before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(random_pair_prefix(load_pair("bart")), tmp_path / "prefix.safetensors")
    served, prompt = str(tmp_path / "served"), ["--prompt", "name : Blue", "--max-new-tokens", "8", "--device", "cpu"]
    export = ["export", "--onnx", str(tmp_path / "prefix.safetensors"), "--backbone", str(traced_before), "-o", served]
    assert run(export) == 0
    assert "random decoder.cross: max |d| " in capfd.readouterr().out
    texts = []
    for more in ([], ["--no-prefix"], ["--prefix", str(tmp_path / "prefix.safetensors")]):
        assert run(["generate", served, *prompt, *more]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[2] != texts[1]
    assert "<s>" not in texts[0]
    assert run([*export, "--dtype", "float16"]) == 2
    assert capfd.readouterr().err == ("prefixkit: --dtype: expected float32 for an encoder-decoder; found float16\n")
