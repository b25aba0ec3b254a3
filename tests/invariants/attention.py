"""Oracles of attention under a prefix: a concatenation by hand, and a mixture of two attentions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix

_NAME = "an_oracle"
_NOW: dict[str, Any] = {}
Mixing = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From the scores and values of the slots, and those of the input, what attention gives."""


def concatenated(slots: Tensor, slot_values: Tensor, own: Tensor, values: Tensor) -> Tensor:
    """One softmax over everything: [K_p; K], [V_p; V]."""
    return torch.softmax(torch.cat([slots, own], dim=-1), dim=-1) @ torch.cat([slot_values, values], dim=2)


def mixed(slots: Tensor, slot_values: Tensor, own: Tensor, values: Tensor) -> Tensor:
    """(1 - λ) Attn(x) + λ Attn(prefix), λ being the slots' share of all (He et al. 2022, arXiv 2110.04366, eq. 7)."""
    shares = torch.stack([slots.logsumexp(-1), own.logsumexp(-1)]).softmax(dim=0)
    return shares[0][..., None] * (slots.softmax(-1) @ slot_values) + shares[1][..., None] * (own.softmax(-1) @ values)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float = 1.0, **_: Any
) -> tuple[Tensor, None]:
    prefix, layer = _NOW["prefix"], _NOW["layer"]
    _NOW["layer"] += 1
    keys, values = (each[layer].to(key.dtype).repeat(len(query), 1, 1, 1) for each in (prefix.keys, prefix.values))
    own = query @ key.mT * scaling
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf)
    return _NOW["mixing"](query @ keys.mT * scaling, values, own, value).transpose(1, 2), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def by_hand(model: PreTrainedModel, prefix: KeyValuePrefix, mixing: Mixing = concatenated) -> Iterator[PreTrainedModel]:
    """`model` whose layers, in the order of their work, look at `prefix` too."""
    previous = model.config._attn_implementation
    _NOW.update(prefix=prefix, layer=0, mixing=mixing)
    model.set_attn_implementation(_NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(previous)


def random_prefix(backbone: Any, length: int = 4, *, offset: bool, seed: int = 1) -> KeyValuePrefix:
    """A prefix that fits `backbone`, an encoder, and means nothing."""
    generator = torch.Generator().manual_seed(seed)
    layers = backbone.geometry
    return KeyValuePrefix(
        keys=tuple(torch.randn(layer.kv_heads, length, layer.key_dim, generator=generator) for layer in layers),
        values=tuple(torch.randn(layer.kv_heads, length, layer.value_dim, generator=generator) for layer in layers),
        positions=Positions(text_start=length if offset else 0, prefix_takes_positions=offset),
        stack="encoder",
    )
