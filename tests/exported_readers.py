"""Exported folders of tiny models that read, with random injections of every kind, each made once a test run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from prefixkit.backbones.load import load_backbone
from prefixkit.export.onnx import Exported, export_onnx
from prefixkit.export.reader_plan import ReadingBackbone
from prefixkit.format.manifest import Manifest, Positions, Provenance, TaskRecord
from prefixkit.injections import (
    EmbeddingPrompt,
    HiddenPrompt,
    Injection,
    KeyValuePrefix,
    One,
    ParameterDelta,
    TaskHead,
    joined,
    records_of,
)
from prefixkit.prefix import Prefix
from tests.encoders import CONFIGS, encoder_folder
from tests.exported import backbone, root

LENGTH, LABELS = 4, 3
TASK = TaskRecord(
    name="kinds",
    input_template="<s>{text}",
    separator="<|im_end|>",
    target_template="{target}",
    bos="none",
    stop=(),
    max_length=40,
    answer="label",
    labels=("food", "river", "city"),
)


@cache
def reading_folder(family: str) -> Path:
    """A tiny random encoder, or a decoder."""
    return encoder_folder(family, root() / family) if family in CONFIGS else backbone(family)


def load_reading(family: str) -> ReadingBackbone:
    """The backbone of `reading_folder`."""
    loaded = load_backbone(reading_folder(family))
    assert isinstance(loaded, ReadingBackbone)
    return loaded


def received(model: ReadingBackbone, kinds: str, seed: int = 1, length: int = LENGTH) -> Injection:
    """Random numbers of the `kinds`: any of `kv`, `prompt PLACE`, `add PLACE`, `replace`, `delta`, `head READS`."""
    generator = torch.Generator().manual_seed(seed)
    return joined(tuple(_part(model, kind.strip(), length, generator) for kind in kinds.split(",")))


def _part(model: ReadingBackbone, kinds: str, length: int, generator: torch.Generator) -> One:
    kind, _, place = kinds.partition(" ")
    stack, width = "decoder" if model.kind == "decoder" else "encoder", model.hidden_size
    rows = [torch.randn(length, width, generator=generator) for _ in model.geometry]
    # Behind a prefix that takes no positions, and behind one that does.
    start = length if model.kind != "vision" and model.identity.family not in ("distilbert", "electra") else 0
    positions = Positions(text_start=start, prefix_takes_positions=start > 0)
    match kind:
        case "kv":
            shapes = [(layer.kv_heads, length, dim) for layer in model.geometry for dim in (layer.key_dim,) * 2]
            drawn = tuple(torch.randn(shape, generator=generator) for shape in shapes)
            return KeyValuePrefix(keys=drawn[0::2], values=drawn[1::2], positions=positions, stack=stack)
        case "prompt":
            before = Positions(text_start=length) if place == "prepend" else Positions(text_start=0)
            return EmbeddingPrompt(embeddings=rows[0], positions=before, placement=place, stack=stack)
        case "add" | "replace":
            where = place or "after_first"
            return HiddenPrompt(hidden=tuple(rows), mode=kind, placement=where, positions=Positions(text_start=0))
        case "delta":
            shapes = model.parameter_shapes("layernorm" if model.identity.family == "llama" else "bias")
            deltas = {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}
            return ParameterDelta(deltas=deltas)
        case _:
            weight = torch.randn(LABELS, width, generator=generator)
            return TaskHead(weight=weight, bias=torch.randn(LABELS, generator=generator), reads=place)


def file_of(model: ReadingBackbone, injection: Injection, task: TaskRecord | None = None) -> Prefix:
    """A file of `injection`, in memory."""
    provenance = Provenance(method="random", prefixkit="0", seed=1)
    manifest = Manifest(backbone=model.identity, injections=records_of(injection), provenance=provenance, task=task)
    return Prefix(manifest, injection.arrays())


@cache
def exported_reader(family: str, kinds: str, task: TaskRecord | None = None) -> Exported:
    """The folder of a tiny model of `family` with `kinds`."""
    model = load_reading(family)
    name = f"served-{family}-{kinds}".replace(" ", "_").replace(",", "-")
    return export_onnx(file_of(model, received(model, kinds), task), model, root() / name)


def retraced(monkeypatch: pytest.MonkeyPatch, family: str, kinds: str) -> Path:
    """The folder of `family`, with tracing replaced by the graph that another test has traced."""
    path = exported_reader(family, kinds).folder / "onnx" / "model.onnx"
    monkeypatch.setattr(
        "prefixkit.export.reader.trace_reader", lambda *_: ir.external_data.load_to_model(ir.load(path))
    )
    return reading_folder(family)
