"""Exported folders of tiny models, each made once a test run: tracing takes seconds."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.backbones.load import load_backbone
from prefixkit.export.onnx import Exported, export_onnx
from prefixkit.format.manifest import BackboneIdentity, Manifest, Positions, Provenance, TaskRecord
from prefixkit.format.names import ATTENTIONS
from prefixkit.injections import KeyValuePrefix, records_of
from prefixkit.prefix import Prefix
from prefixkit.task import load_task, load_tokenizer
from tests import encoder_decoders
from tests.architectures import tiny
from tests.encoder_decoders import Place
from tests.small_tokenizer import END, write_folder

LENGTH = 6
TASK = TaskRecord(
    name="say",
    input_template="name : {input}",
    separator=END,
    target_template=" {target}",
    bos="none",
    stop=(END,),
    max_length=64,
)


@cache
def root() -> Path:
    """A folder that goes when the run ends."""
    made = tempfile.TemporaryDirectory(prefix="prefixkit-tests-")
    _KEPT.append(made)
    return Path(made.name)


_KEPT: list[Any] = []


@cache
def backbone(family: str, seed: int = 0) -> Path:
    """A tiny random model with a tokenizer."""
    folder = root() / f"{family}-{seed}"
    tiny(family, seed).save_pretrained(folder)
    return write_folder(folder, tokenizer_config={"bos_token": END, "eos_token": END})


def random_prefix(
    identity: BackboneIdentity, *, seed: int = 1, length: int = LENGTH, task: TaskRecord | None = TASK
) -> Prefix:
    """A prefix of random numbers for a backbone."""
    generator = torch.Generator().manual_seed(seed)
    layers = identity.stacks["decoder"]
    made = KeyValuePrefix(
        keys=tuple(torch.randn(layer.kv_heads, length, layer.key_dim, generator=generator) for layer in layers),
        values=tuple(torch.randn(layer.kv_heads, length, layer.value_dim, generator=generator) for layer in layers),
        positions=Positions(text_start=length),
    )
    provenance = Provenance(method="random", prefixkit="0", seed=seed)
    manifest = Manifest(backbone=identity, injections=(made.record(),), provenance=provenance, task=task)
    return Prefix(manifest, made.arrays())


@cache
def exported(family: str, **options: Any) -> Exported:
    """The folder of a tiny model of `family` with `random_prefix`."""
    name = "-".join([family, *(f"{key}-{value}" for key, value in sorted(options.items()))])
    loaded = load_backbone(backbone(family), dtype=options.get("dtype", "float32"))
    return export_onnx(random_prefix(loaded.identity), loaded, root() / f"served-{name}", **options)


@cache
def pair_backbone(family: str, seed: int = 0) -> Path:
    """A tiny random encoder-decoder with a tokenizer."""
    return encoder_decoders.folder_of(family, root() / f"{family}-{seed}", seed)


def random_pair_prefix(
    backbone: EncoderDecoder, *, length: int = LENGTH, places: tuple[Place, ...] = ATTENTIONS
) -> Prefix:
    """A prefix of random numbers for each of `places`."""
    made = encoder_decoders.random_prefixes(backbone, length, places)
    tokenizer = load_tokenizer(backbone.folder)
    task = load_task("text", tokenizer, max_length=64, kind="encoder-decoder")
    provenance = Provenance(method="random", prefixkit="0", seed=1)
    manifest = Manifest(backbone=backbone.identity, injections=records_of(made), provenance=provenance, task=task)
    return Prefix(manifest, made.arrays())


def load_pair(family: str, seed: int = 0) -> EncoderDecoder:
    """The backbone of `pair_backbone`."""
    loaded = load_backbone(pair_backbone(family, seed))
    assert isinstance(loaded, EncoderDecoder)
    return loaded


@cache
def exported_pair(family: str) -> Exported:
    """The folder of a tiny encoder-decoder with `random_pair_prefix`."""
    loaded = load_pair(family)
    return export_onnx(random_pair_prefix(loaded), loaded, root() / f"served-{family}")
