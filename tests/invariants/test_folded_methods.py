"""What a method leaves behind when training ends gives what it gave, and folding it again changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefixkit.backbones.encoder import Encoder
from prefixkit.format.manifest import Manifest, Provenance
from prefixkit.injections import TaskHead, injection, part_of, records_of
from prefixkit.methods.with_head import WithHead
from prefixkit.prefix import Prefix, load, save
from tests.encoders import rows, together
from tests.invariants.encoder_methods import CELLS, METHODS

TOLERANCE = 1e-5
EFFECT = 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("method", "family"), CELLS)
def test_folded_equals_unfolded_through_a_file(
    encoder: Callable[..., Encoder], method: str, family: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    backbone, batch = encoder(family), together(rows(family))
    trained = WithHead(METHODS[method](backbone), outputs=3, hidden=64, reads="first")
    for parameter in trained.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    made = trained.fold()
    provenance = Provenance(method=method.split()[0], prefixkit="0")
    manifest = Manifest(backbone=backbone.identity, injections=records_of(made), provenance=provenance)
    save(Prefix(manifest, made.arrays()), tmp_path / "made")
    stored = injection(load(tmp_path / "made"))
    expected, folded = backbone.states(batch, trained()), backbone.fold(stored)
    for received in (made, stored, folded, backbone.fold(folded)):
        head = part_of(received, TaskHead)
        assert head is not None
        assert torch.equal(head.weight, trained.head_weight)
        assert real(backbone.states(batch, received) - expected, batch).abs().max() <= TOLERANCE
    assert real(backbone.states(batch) - expected, batch).abs().max() > EFFECT
    once, twice = folded.arrays(), backbone.fold(folded).arrays()
    assert once.keys() == twice.keys()
    assert all((once[name] == twice[name]).all() for name in once)


def real(states: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return states[batch["attention_mask"].bool()] if "attention_mask" in batch else states
