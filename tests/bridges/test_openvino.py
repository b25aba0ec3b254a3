"""OpenVINO against PyTorch: prefixes as the past of a stateless model, and as the states of a stateful one."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.load import load_backbone
from prefixkit.bridges import openvino_folder
from prefixkit.bridges.openvino import EXACT, past, start, stateful
from prefixkit.bridges.openvino_folder import export_openvino
from prefixkit.bridges.openvino_readme import readme
from prefixkit.bridges.portable import Portable
from prefixkit.cli import run
from prefixkit.errors import ConfigError, FormatError, InputError, MismatchError, ParityError
from prefixkit.export.folded import folded_file
from prefixkit.format.manifest import InjectionRecord, Positions
from prefixkit.prefix import Array, Prefix, load, save
from prefixkit.task import decode_target, encode_prompt, load_tokenizer
from tests.bridges.folders import EFFECT, STEPS, TOLERANCE, in_pytorch, prefixes, texts
from tests.exported import LENGTH, TASK, backbone, exported, random_prefix, root
from tests.prefixes import small_prefix
from tests.small_tokenizer import END


def onnx(family: str) -> Any:
    return openvino.Core().read_model(exported(family).folder / "onnx" / "model.onnx")


def compiled(model: Any) -> Any:
    return openvino.Core().compile_model(model, "CPU", dict(EXACT))


@cache
def stateless() -> Any:
    return compiled(onnx("llama"))


@cache
def request() -> Any:
    model = onnx("llama")
    stateful(model)
    return compiled(model).create_infer_request()


class Batch:
    """Rows padded on the left, fed step by step, with positions and a mask that begin as the bridge says."""

    def __init__(self, rows: list[list[int]], begun: Any) -> None:
        width = max(map(len, rows))
        self.ids = np.array([[0] * (width - len(row)) + row for row in rows])
        real = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.mask = np.concatenate([begun.mask, real], axis=1)
        self.positions = np.maximum(begun.positions[:, None] + real.cumsum(1) - 1, 0)
        self.logits: list[Array] = []

    @property
    def feeds(self) -> dict[str, Array]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}

    def advance(self, logits: Array) -> None:
        self.logits.append(logits)
        self.ids = logits[:, -1:].argmax(-1)
        self.mask = np.concatenate([self.mask, np.ones_like(self.ids)], axis=1)
        self.positions = self.positions[:, -1:] + 1


def by_past(rows: list[list[int]], given: list[Prefix | None]) -> Array:
    begun = past(stateless(), given)
    batch, tensors = Batch(rows, begun), dict(begun.tensors)
    for _ in range(STEPS):
        found = stateless()({**batch.feeds, **tensors})
        tensors = {name: found[name.replace("past_key_values", "present")].copy() for name in tensors}
        batch.advance(found["logits"].copy())
    return np.concatenate(batch.logits, axis=1)


def by_state(rows: list[list[int]], given: list[Prefix | None]) -> Array:
    batch = Batch(rows, start(request(), given))
    for _ in range(STEPS):
        batch.advance(request().infer(batch.feeds)["logits"].copy())
    return np.concatenate(batch.logits, axis=1)


@pytest.mark.parametrize("way", [by_past, by_state])
@pytest.mark.parametrize("names", [("say", "other", None), ("say",), (None, None), ("other", "other")])
def test_a_batch_computes_what_pytorch_computes(way: Any, names: tuple[str | None, ...]) -> None:
    rows = texts()[: len(names)]
    given = [None if name is None else prefixes("llama")[name] for name in names]
    logits = way(rows, given)
    for row, (text, prefix) in enumerate(zip(rows, given, strict=True)):
        tokens, expected = in_pytorch("llama", prefix, text)
        found = logits[row, -len(expected) :]
        assert np.abs(found - expected).max() <= TOLERANCE
        assert found[len(text) - 1 :].argmax(-1).tolist() == tokens
        if prefix is not None:
            assert np.abs(found - in_pytorch("llama", None, text)[1])[: len(text)].max() > EFFECT


@cache
def prompted() -> Prefix:
    """A soft prompt, for a prefix that is folded on its way."""
    identity = load_backbone(backbone("gpt2")).identity
    record = InjectionRecord(
        kind="embedding_prompt",
        stack="decoder",
        length=LENGTH,
        positions=Positions(text_start=LENGTH),
        placement="prepend",
    )
    manifest = replace(random_prefix(identity).manifest, injections=(record,))
    drawn = np.random.default_rng(4).normal(scale=3, size=(LENGTH, identity.hidden_size))
    return Prefix(manifest, {"prompt.embeddings": drawn.astype(np.float32)})


@cache
def written() -> Path:
    """What the command writes for it."""
    save(prompted(), root() / "prompt.safetensors")
    folder = root() / "openvino"
    arguments = ["--openvino", str(root() / "prompt.safetensors"), "--backbone", str(backbone("gpt2"))]
    assert run(["export", *arguments, "-o", str(folder)]) == 0
    return folder


def test_the_folder_and_the_code_in_its_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_backbone(backbone("gpt2"))
    assert isinstance(decoder, Decoder)
    prefix = load(written() / "prefix.safetensors")
    folded = folded_file(prompted(), decoder)
    assert prefix.manifest.injections == folded.manifest.injections
    assert {name: array.tobytes() for name, array in prefix.tensors.items()} == {
        name: array.tobytes() for name, array in folded.tensors.items()
    }
    assert not list(written().glob("*.onnx*"))
    code = re.findall(r"```python\n(.*?)```", (written() / "README.md").read_text(), re.DOTALL)[0]
    monkeypatch.chdir(written())
    names: dict[str, Any] = {}
    exec(code, names)
    text = texts()[0]
    found = names["generate"]([text, text[2:]], [prefix, None], new_tokens=STEPS).tolist()
    assert found == [in_pytorch("gpt2", prefix, text)[0], in_pytorch("gpt2", None, text[2:])[0]]
    assert found[0] != in_pytorch("gpt2", None, text)[0]
    asked = {"input": f"Blue Spice {END}"}
    tokenizer = load_tokenizer(written())
    tokens, _ = in_pytorch("gpt2", prefix, encode_prompt(TASK, tokenizer, asked))
    assert names["write"]([asked], [prefix], new_tokens=STEPS) == [decode_target(TASK, tokenizer, tokens)]


def test_the_readme_of_other_tasks() -> None:
    conversation, none = replace(TASK, input_template="{messages}", chat_template_hash="b3-v1:" + "0" * 64), None
    two = replace(TASK, input_template="{premise} and {hypothesis}")
    for task, told in (
        (two, "asked = {'premise': 'a text', 'hypothesis': 'a text'}"),
        (conversation, "An input is a conversation: `messages`, or `input` for"),
        (none, 'rows = [tokenizer.encode_text(fields["input"]) for fields in asked]'),
    ):
        prefix = prefixes("gpt2")["say"]
        text = readme(Prefix(replace(prefix.manifest, task=task), prefix.tensors), {"input_ids": "input_ids"})
        assert told in text
        compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "README.md", "exec")


def test_a_folder_for_another_runtime_stays(tmp_path: Path) -> None:
    for kind in ("onnxruntime-genai", None):
        (tmp_path / "prefixkit.json").write_text(json.dumps({"version": 1} | ({"runtime": kind} if kind else {})))
        told = f"expected a new folder or one for OpenVINO; found one for {kind or 'something else'}; choose another"
        with pytest.raises(InputError, match=told):
            export_openvino(prefixes("gpt2")["say"], str(tmp_path), backbone=str(backbone("gpt2")))
        assert [path.name for path in tmp_path.iterdir()] == ["prefixkit.json"]
    assert json.loads((written() / "prefixkit.json").read_text())["runtime"] == "OpenVINO"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MismatchError, match=r"2 layers of .* \(2, 16, 16\); found 2 layers of .* \(2, 4, 4\); take the"
    ):
        past(stateless(), [small_prefix()])
    with pytest.raises(MismatchError, match=r"found 2 layers of .* \(4, 16, 16\)"):
        start(request(), [None, prefixes("gpt2")["say"]])
    with pytest.raises(FormatError, match="expected a decoder and prefixes for its rows; found no row"):
        start(request(), [])
    with pytest.raises(FormatError, match="found a model without a past; `prefixkit export --openvino` writes one"):
        past(request().get_compiled_model(), [None])
    (record,) = small_prefix().manifest.injections
    moved = replace(record, positions=Positions(text_start=0, prefix_takes_positions=False))
    elsewhere = Prefix(replace(small_prefix().manifest, injections=(moved,)), small_prefix().tensors)
    with pytest.raises(FormatError, match="right behind the prefix, as OpenVINO counts"):
        past(stateless(), [elsewhere])
    with pytest.raises(FormatError, match="right behind the prefix, as OpenVINO counts"):
        export_openvino(elsewhere, tmp_path / "out", backbone=str(backbone("gpt2")))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(prefix: Prefix, backbone: str, folder: Path, *, dtype: str, runtime: str) -> Any:
        for file in (exported("llama").folder / "onnx").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return Portable(prefix, {"graph": {"inputs": {}}})

    def wrong(request: Any, given: list[Prefix]) -> Any:
        return start(request, [Prefix(one.manifest, {k: 1.01 * v for k, v in one.tensors.items()}) for one in given])

    monkeypatch.setattr(openvino_folder, "write_portable", copied)
    monkeypatch.setattr(openvino_folder, "start", wrong)
    with pytest.raises(ParityError, match=r"openvino_model.xml: expected logits of OpenVINO within .* nothing was"):
        export_openvino(prefixes("llama")["say"], tmp_path / "out", backbone="")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"expected openvino; found none; pip install 'prefixkit\[openvino\]'"):
        export_openvino(small_prefix(), tmp_path / "out", backbone="x")
