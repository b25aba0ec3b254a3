"""A key-value prefix on a loaded encoder: what it equals, and what leaves it as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from prefixkit.backbones.encoder import Encoder
from prefixkit.format.manifest import Positions
from tests.encoders import CONFIGS, TEXT, rows, spelled_out, together
from tests.invariants.attention import by_hand, concatenated, mixed, random_prefix

Load = Callable[..., Encoder]
Plain = Callable[..., PreTrainedModel]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
EFFECT = 0.1
PLACED = [(family, offset) for family in CONFIGS for offset in ((True, False) if family in TEXT else (False,))]
"""Images have no positions to give away."""


@torch.no_grad()
@pytest.mark.parametrize("mixing", [concatenated, mixed])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("family", "offset"), PLACED)
def test_states_are_those_of_attention_by_hand(
    encoder: Load, plain: Plain, family: str, offset: bool, dtype: torch.dtype, mixing: object
) -> None:
    backbone, (row, *_) = encoder(family, dtype), rows(family, dtype)
    prefix, base = random_prefix(backbone, offset=offset), plain(family, dtype).base_model
    with by_hand(base, prefix, mixing):  # type: ignore[arg-type]
        expected = base(**spelled_out(family, row, 4 if offset else 0)).last_hidden_state
    found = backbone.states(row, prefix)
    assert (found - expected).abs().max() <= TOLERANCE[dtype]
    assert (found - backbone.states(row)).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", TEXT)
def test_target_logits_are_those_of_attention_by_hand(
    encoder: Load, plain: Plain, family: str, dtype: torch.dtype
) -> None:
    backbone, inputs, places = encoder(family, dtype), rows(family), [(1, 4), (3,), (6, 9)]
    prefix, model = random_prefix(backbone, offset=True), plain(family, dtype)
    batch, expected = together(inputs, more=3), []
    labels = torch.full_like(batch["input_ids"], -100)
    for index, (row, chosen) in enumerate(zip(inputs, places, strict=True)):
        labels[index, list(chosen)] = 7
        with by_hand(model, prefix):
            expected.append(model(**spelled_out(family, row, 4)).logits[0, list(chosen)])
    found = backbone.target_logits(**batch, labels=labels, prefix=prefix)
    bare = backbone.target_logits(**batch, labels=labels)
    assert (found - torch.cat(expected)).abs().max() <= TOLERANCE[dtype]
    assert (found - bare).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_nothing_received_is_the_base_model_bit_for_bit(encoder: Load, plain: Plain, family: str) -> None:
    backbone, (row, *_) = encoder(family), rows(family)
    empty = random_prefix(backbone, 0, offset=False)
    base = plain(family).base_model(**spelled_out(family, row)).last_hidden_state
    assert torch.equal(backbone.states(row), base)
    assert torch.equal(backbone.states(row, empty), base)
    backbone.states(row, random_prefix(backbone, offset=False))
    assert torch.equal(backbone.release().base_model(**spelled_out(family, row)).last_hidden_state, base)


@torch.no_grad()
@pytest.mark.parametrize("family", TEXT)
def test_an_offset_is_the_base_model_that_many_positions_on(encoder: Load, plain: Plain, family: str) -> None:
    """A prefix without slots that takes four positions: the same numbers, four places on."""
    backbone, (row, *_) = encoder(family), rows(family)
    moved = replace(random_prefix(backbone, 0, offset=False), positions=Positions(text_start=4))
    expected = plain(family).base_model(**spelled_out(family, row, 4)).last_hidden_state
    found = backbone.states(row, moved)
    assert (found - expected).abs().max() <= TOLERANCE[torch.float32]
    # ModernBERT's rotations know distances only.
    assert (found - backbone.states(row)).abs().max() > (EFFECT if family != "modernbert" else -1.0)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_zeros_are_no_base_model(encoder: Load, family: str) -> None:
    """Each zero key takes its share of attention, exp(0), and gives nothing for it."""
    backbone, (row, *_) = encoder(family), rows(family)
    drawn = random_prefix(backbone, offset=False)
    keys, values = (tuple(map(torch.zeros_like, each)) for each in (drawn.keys, drawn.values))
    found = backbone.states(row, replace(drawn, keys=keys, values=values))
    assert (found - backbone.states(row)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("more", [0, 5])
@pytest.mark.parametrize("family", CONFIGS)
def test_each_row_of_a_batch_is_itself_alone(encoder: Load, family: str, more: int) -> None:
    backbone, inputs = encoder(family), rows(family)
    prefix = random_prefix(backbone, offset=family in TEXT)
    found = backbone.states(together(inputs, more), prefix)
    for index, row in enumerate(inputs):
        alone = backbone.states(row, prefix)[0]
        assert (found[index, : len(alone)] - alone).abs().max() <= TOLERANCE[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_the_order_of_slots_does_not_matter(encoder: Load, family: str) -> None:
    backbone, (row, *_) = encoder(family, torch.float64), rows(family, torch.float64)
    prefix, order = random_prefix(backbone, offset=False), [2, 0, 3, 1]
    turned = replace(
        prefix,
        keys=tuple(key[:, order] for key in prefix.keys),
        values=tuple(value[:, order] for value in prefix.values),
    )
    assert (backbone.states(row, turned) - backbone.states(row, prefix)).abs().max() <= TOLERANCE[torch.float64]
    mismatched = replace(prefix, keys=turned.keys)
    assert (backbone.states(row, mismatched) - backbone.states(row, prefix)).abs().max() > 1e-3
