"""The slots of an encoder-decoder's prefixes: in no order, and never without an effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prefixkit.format.names import ATTENTIONS
from prefixkit.injections import KeyValuePrefixes
from tests.encoder_decoders import CONFIGS, END, Place, random_prefixes, tiny, to_double, wrap
from tests.ragged import prompts

WRITTEN = torch.tensor([[END, 11, 12, 13]])
Change = Callable[[Tensor], Tensor]


def changed(prefixes: KeyValuePrefixes, keys: Change, values: Change) -> KeyValuePrefixes:
    return KeyValuePrefixes(
        parts=tuple(
            replace(part, keys=tuple(map(keys, part.keys)), values=tuple(map(values, part.values)))
            for part in prefixes.parts
        )
    )


def turned(tensor: Tensor) -> Tensor:
    return tensor[:, [2, 0, 3, 1]]


@torch.no_grad()
@pytest.mark.parametrize("place", ATTENTIONS, ids=".".join)
@pytest.mark.parametrize("family", CONFIGS)
def test_the_order_of_slots_does_not_matter_and_zeros_do(family: str, place: Place) -> None:
    """T5 biases by distance, and a slot is at none."""
    backbone, row = wrap(to_double(tiny(family))), prompts()[0][None]
    prefixes = random_prefixes(backbone, 4, (place,))
    expected, bare = (backbone.logits(row, None, WRITTEN, each) for each in (prefixes, None))
    found = backbone.logits(row, None, WRITTEN, changed(prefixes, turned, turned))
    assert (found - expected).abs().max() <= 1e-10
    apart = backbone.logits(row, None, WRITTEN, changed(prefixes, turned, Tensor.clone))
    assert (apart - expected).abs().max() > 1e-3
    zeros = backbone.logits(row, None, WRITTEN, changed(prefixes, torch.zeros_like, torch.zeros_like))
    assert (zeros - bare).abs().max() > 1e-3
