"""Prefixes small enough to read in a hex dump, and files with a defect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefixkit.format.manifest import (
    BackboneIdentity,
    InjectionRecord,
    LayerGeometry,
    Manifest,
    Positions,
    Provenance,
    TaskRecord,
)
from prefixkit.prefix import Prefix

GOLDEN = Path(__file__).parent / "golden" / "prefix-v1.safetensors"

TASK = TaskRecord(
    name="e2e",
    input_template="{input}",
    separator=" =>",
    target_template=" {target}",
    bos="none",
    stop=("<|endoftext|>",),
    max_length=24,
    filler_id=0,
)


def small_prefix(*, layers: int = 2, length: int = 3, dtype: Any = np.float32, seed: int | None = None) -> Prefix:
    """Keys and values [2, length, 4] for each layer: counted through, or random for a seed."""
    identity = BackboneIdentity(
        name="tiny",
        family="gpt2",
        hidden_size=8,
        vocab_size=64,
        context_length=32,
        dtype="float16",
        config_hash="b3-v1:" + "c" * 64,
        weights_hash="b3t-v1:" + "d" * 64,
        tokenizer_hash=None,
        stacks={"decoder": (LayerGeometry(kv_heads=2, key_dim=4, value_dim=4),) * layers},
    )
    record = InjectionRecord(
        kind="key_value_prefix",
        stack="decoder",
        attention="self",
        length=length,
        positions=Positions(text_start=length),
        frozen_slots=0,
    )
    provenance = Provenance(
        method="prefix-tuning", prefixkit="0.1.0", config={"lr": 0.03}, seed=7, metrics={"loss": 1.5}
    )
    manifest = Manifest(backbone=identity, injections=(record,), provenance=provenance, task=TASK)
    return Prefix(manifest, _arrays(layers, length, dtype, seed))


def soft_prompt(identity: BackboneIdentity, *, length: int, seed: int, dtype: Any = np.float32) -> Prefix:
    """Random vectors [length, hidden] before the text of a decoder."""
    vectors = np.random.default_rng(seed).normal(size=(length, identity.hidden_size)).astype(dtype)
    record = InjectionRecord(
        kind="embedding_prompt",
        stack="decoder",
        length=length,
        placement="prepend",
        positions=Positions(text_start=length),
    )
    provenance = Provenance(method="prompt-tuning", prefixkit="0.1.0")
    manifest = Manifest(backbone=identity, injections=(record,), provenance=provenance)
    return Prefix(manifest, {"prompt.embeddings": vectors})


def _arrays(layers: int, length: int, dtype: Any, seed: int | None) -> dict[str, Any]:
    size = 2 * length * 4
    generator = None if seed is None else np.random.default_rng(seed)
    arrays = {}
    for layer in range(layers):
        for half, role in enumerate(("key", "value")):
            counted = np.arange(size, dtype=np.float32) / 4 + layer + half / 2
            numbers = counted if generator is None else generator.normal(size=size)
            arrays[f"decoder.self.layers.{layer}.{role}"] = numbers.astype(dtype).reshape(2, length, 4)
    return arrays


def write_safetensors(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"") -> Path:
    """A file with exactly this header and data, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
