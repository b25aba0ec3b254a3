"""Files of encoders: as large as their tensors and header, and for the backbone that they were made for alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixkit.backbones.deltas import biases
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.load import load_backbone
from prefixkit.errors import MismatchError
from prefixkit.format.manifest import Manifest, Provenance
from prefixkit.injections import Combined, Injection, ParameterDelta, TaskHead, injection, parts_of, records_of
from prefixkit.methods.visual_prompt_tuning import VisualPromptTuning
from prefixkit.prefix import Prefix, load, matches, save
from tests.encoders import encoder_folder
from tests.invariants.attention import random_prefix

Load = Callable[..., Encoder]
HEAD = TaskHead(weight=torch.zeros(3, 64), bias=torch.zeros(3), reads="first")
HEAD_NUMBERS = 3 * 64 + 3
RECEIVED: dict[str, tuple[str, Callable[[Encoder], Injection], int]] = {
    "prefix": ("bert", lambda encoder: random_prefix(encoder, offset=True), 4 * 2 * 2 * 64),
    "deep": ("vit", lambda encoder: VisualPromptTuning(torch.zeros(2, 5, 64), layers=2)(), 5 * 2 * 64),
    "shallow": ("vit", lambda encoder: VisualPromptTuning(torch.zeros(1, 5, 64), layers=2)(), 5 * 64),
    "delta": (
        "roberta",
        lambda encoder: ParameterDelta(deltas={name: bias.clone() for name, bias in inner(encoder).items()}),
        # A layer: four of attention, an MLP of 96 and 64, two normalisations; and one before the layers.
        2 * (4 * 64 + 96 + 64 + 2 * 64) + 64,
    ),
}


def inner(backbone: Encoder) -> dict[str, torch.Tensor]:
    shapes = backbone.parameter_shapes("bias", reading=True)
    return {name: bias for name, bias in biases(backbone.model).items() if name in shapes}


def prefix_of(backbone: Encoder, received: Injection) -> Prefix:
    provenance = Provenance(method="p-tuning-v2", prefixkit="0")
    manifest = Manifest(backbone=backbone.identity, injections=records_of(received), provenance=provenance)
    return Prefix(manifest, received.arrays())


@pytest.mark.parametrize("kind", RECEIVED)
def test_a_file_is_its_tensors_and_its_header(encoder: Load, kind: str, tmp_path: Path) -> None:
    family, make, numbers = RECEIVED[kind]
    backbone = encoder(family)
    received = Combined(parts=(*parts_of(make(backbone)), HEAD))
    save(prefix_of(backbone, received), tmp_path / "made")
    stored = (tmp_path / "made").read_bytes()
    header = int.from_bytes(stored[:8], "little")
    assert len(stored) == 8 + header + 4 * (numbers + HEAD_NUMBERS)
    assert {name for name in json.loads(stored[8 : 8 + header]) if name != "__metadata__"} == set(received.arrays())
    again = injection(load(tmp_path / "made"))
    assert [type(part) for part in parts_of(again)] == [type(part) for part in received.parts]


def other_weights(folder: Path) -> None:
    """One number is another."""
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_config(folder: Path) -> None:
    """The same weights, read in another way."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    ("change", "level"),
    [(other_weights, "weights; geometry and config agree"), (other_config, "config; geometry agrees")],
)
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_another_backbone_is_refused(
    encoder: Load, family: str, change: Callable[[Path], None], level: str, tmp_path: Path
) -> None:
    made = prefix_of(encoder(family), random_prefix(encoder(family), offset=False))
    folder = encoder_folder(family, tmp_path / family)
    matches(made, load_backbone(folder).identity)
    change(folder)
    with pytest.raises(MismatchError, match=level):
        matches(made, load_backbone(folder).identity)


def test_another_family_of_the_same_shape_is_refused(encoder: Load) -> None:
    """A prefix of BERT has the shapes that RoBERTa's has."""
    made = prefix_of(encoder("bert"), random_prefix(encoder("bert"), offset=True))
    with pytest.raises(MismatchError, match="architecture bert; found roberta"):
        matches(made, encoder("roberta").identity)
