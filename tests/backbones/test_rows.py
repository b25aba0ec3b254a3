"""A prefix for each row of a batch: every row as if it were alone with its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefixkit.backbones.load import load_backbone
from prefixkit.errors import BackboneError
from prefixkit.injections import KeyValuePrefix, row_prefixes
from tests import encoder_decoders
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import wrap
from tests.encoders import TEXT, encoder_folder
from tests.ragged import alone, padded, prompts, random_prefix, to_double

THROUGH_CACHE = ("falcon", "bloom")
OWNER = torch.tensor([2, 0, 2])


def several(model: torch.nn.Module, lengths: tuple[int, ...] = (3, 5, 7)) -> list[KeyValuePrefix]:
    return [random_prefix(model, length, seed) for seed, length in enumerate(lengths)]  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in THROUGH_CACHE])
def test_each_row_sees_its_own_prefix(family: str, side: str) -> None:
    decoder, rows = wrap(tiny(family)), prompts()
    prefixes = several(decoder.model)
    batch = padded(rows, side)
    with torch.no_grad():
        found = decoder.logits(**batch, prefix=row_prefixes(prefixes, OWNER))
        decoder.release()
        for index, row in enumerate(rows):
            own, real = found[index][batch["attention_mask"][index].bool()], OWNER[index]
            assert (own - alone(decoder.model, row, prefixes[real])).abs().max() <= 1e-5
            assert (own - alone(decoder.model, row, prefixes[1])).abs().max() > 0.1


def test_rows_of_one_length_without_padding() -> None:
    """Where there is nothing to mask, attention is called without a mask."""
    decoder, prefixes = wrap(tiny("llama")), several(tiny("llama"))
    rows = torch.stack([row[:5] for row in prompts()])
    with torch.no_grad():
        found = decoder.logits(rows, prefix=row_prefixes(prefixes, OWNER))
        decoder.release()
        for index, row in enumerate(rows):
            assert (found[index] - alone(decoder.model, row, prefixes[OWNER[index]])).abs().max() <= 1e-5


def test_gradients_are_those_of_each_prefix_in_a_pass_of_its_own() -> None:
    decoder, rows = wrap(tiny("qwen3").double().requires_grad_(False)), prompts()
    prefixes = [to_double(prefix) for prefix in several(decoder.model)]
    leaves = [tensor.requires_grad_() for prefix in prefixes for tensor in (*prefix.keys, *prefix.values)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(len(row), 320, generator=generator, dtype=torch.float64) for row in rows]
    batch = padded(rows, "right")
    logits = decoder.logits(**batch, prefix=row_prefixes(prefixes, OWNER))
    parts = [(logits[index, : len(row)] * weights[index]).sum() for index, row in enumerate(rows)]
    found = torch.autograd.grad(torch.stack(parts).sum(), leaves, allow_unused=True)
    owned = [prefixes[owner] for owner in OWNER]
    apart = [decoder.logits(row[None], prefix=one)[0] for row, one in zip(rows, owned, strict=True)]
    total = torch.stack([(one * weight).sum() for one, weight in zip(apart, weights, strict=True)]).sum()
    expected = torch.autograd.grad(total, leaves, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert (ours - theirs).abs().max() <= 1e-10
    assert sum(bool(one.abs().max() > 1e-3) for one in found) == 2 * len(found) // 3  # the second prefix has no row


@pytest.mark.parametrize("family", TEXT)
def test_encoders(family: str, tmp_path: Path) -> None:
    encoder = load_backbone(encoder_folder(family, tmp_path / family))
    prefixes = [encoder.key_values_of(list(range(5, 5 + length))) for length in (3, 5, 7)]
    assert all(isinstance(prefix, KeyValuePrefix) for prefix in prefixes)
    rows = prompts()
    with torch.no_grad():
        found = encoder.states(padded(rows, "right"), row_prefixes(prefixes, OWNER))  # type: ignore[arg-type]
        for index, row in enumerate(rows):
            inputs = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
            own, other = (encoder.states(inputs, prefixes[which])[0] for which in (int(OWNER[index]), 1))
            assert (found[index, : len(row)] - own).abs().max() <= 1e-5
            assert (found[index, : len(row)] - other).abs().max() > 1e-3


@pytest.mark.parametrize("family", THROUGH_CACHE)
def test_a_prefix_that_goes_through_the_cache_is_for_all_rows(family: str) -> None:
    decoder = wrap(tiny(family))
    with pytest.raises(BackboneError, match="expected one prefix for all rows; found a prefix for each row"):
        decoder.logits(**padded(prompts()), prefix=row_prefixes(several(decoder.model), OWNER))


def test_so_are_those_of_an_encoder_decoder() -> None:
    backbone = encoder_decoders.wrap(encoder_decoders.tiny("t5"))
    prefix = encoder_decoders.random_prefixes(backbone).parts[0]
    batch = padded(prompts(), "right")
    with pytest.raises(BackboneError, match="expected one prefix for all rows"):
        backbone.target_logits(*batch.values(), torch.ones(3, 2, dtype=torch.long), row_prefixes([prefix], OWNER * 0))
