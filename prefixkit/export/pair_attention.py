"""Attention while an encoder is traced: it takes keys and values before its own, or shows those it has."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

KEYWORD = "prefixkit_given"
"""The keyword argument of a stack's forward pass that holds a `Given`."""
_NAME = "prefixkit_pair_export"


@dataclass
class Given:
    """What travels down a stack.

    Attributes:
        before: key and value for each layer, in the order of their work, to stand before its own.
        seen: where cross-attentions leave their keys and values.
        masks: additive masks over `before` and the stack's own, by sliding window; empty for the model's own masks.
    """

    before: Iterator[tuple[Tensor, Tensor]] = field(default_factory=lambda: iter(()))
    seen: list[Tensor] | None = None
    masks: Mapping[int | None, Tensor] = field(default_factory=dict)


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """`model` with this attention for the length of a `with` block."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **keywords: Any) -> Any:
    given: Given = keywords.pop(KEYWORD, None) or Given()
    if given.seen is not None and not module.is_causal:
        given.seen += [key, value]
    before = next(given.before, None)
    if before is not None:
        key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
    if given.masks:
        mask = given.masks[keywords.get("sliding_window")]
    # Each modelling file has its own eager function, of which the tracer makes plain operators.
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **keywords)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
