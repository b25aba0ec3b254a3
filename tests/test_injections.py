"""Injections: from tensors to a file and back, bit for bit, in every dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefixkit.format.manifest import LayerGeometry, Manifest, Positions, Provenance
from prefixkit.injections import KeyValuePrefix, key_value_prefix
from prefixkit.prefix import Prefix, load, save
from tests.architectures import tiny
from tests.backbones.test_decoder import wrap


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    identity = wrap(tiny("llama")).identity
    assert identity.stacks["decoder"][0] == LayerGeometry(kv_heads=2, key_dim=16, value_dim=16)
    tensors = tuple(torch.randn(2, 3, 16).to(dtype) for _ in range(4))
    prefix = KeyValuePrefix(keys=tensors[:2], values=tensors[2:], positions=Positions(text_start=3), frozen_slots=1)
    provenance = Provenance(method="test", prefixkit="0")
    manifest = Manifest(backbone=identity, injections=(prefix.record(),), provenance=provenance)
    save(Prefix(manifest, prefix.arrays()), tmp_path / "p")
    found = key_value_prefix(load(tmp_path / "p"))
    assert (found.positions, found.frozen_slots, found.length) == (prefix.positions, 1, 3)
    assert all(map(torch.equal, [*found.keys, *found.values], tensors))
    assert {tensor.dtype for tensor in found.keys} == {dtype}
