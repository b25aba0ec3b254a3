"""Attention over short rows on a CPU, every score at once: what torch's kernel does in blocks, which pay in long rows.

The products are those of Vaswani et al. 2017 (arXiv 1706.03762), one for all heads that share keys and values. With
gradients alone: the shares are kept for the way back, [batch, heads, seq, keys].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "short_sdpa"
"""Its name in the registry of attention functions."""
LONGEST = 128
"""Keys up to which this is faster, by 17 to 34 % on two cores (tests/bench/README.md); from 384 on it is slower."""
_BEFORE = "sdpa"
_DTYPES = (torch.float32, torch.float64)


def attend_short_rows(model: PreTrainedModel) -> None:
    """Let `model`, whose attention is torch's and goes through the registry of `transformers`, attend so in training.

    On a CPU, and until `attend_by_torch` undoes it.
    """
    if model.device.type == "cpu" and model.config._attn_implementation == _BEFORE:
        model.set_attn_implementation(NAME)


def attend_by_torch(model: PreTrainedModel) -> None:
    """Undo `attend_short_rows`."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(_BEFORE)


def sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> Any:
    """The attention function of that name, as `transformers` calls it."""
    if attention_mask is not None and is_short(query, key, value, attention_mask, **keywords):
        return attend_short(query, key, value, attention_mask, keywords.get("scaling")), None
    return ALL_ATTENTION_FUNCTIONS[_BEFORE](module, query, key, value, attention_mask, **keywords)


def is_short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **keywords: Any) -> bool:
    """Whether `attend_short` is to do what attention is asked for, with the keywords that `transformers` gives it."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    told = keywords.get("dropout") or any(keywords.get(name) is not None for name in ("position_bias", "softcap"))
    known = query.device.type == "cpu" and query.dtype in _DTYPES and mask.dtype == torch.bool
    return wanted and not told and known and len(query) == len(key) and 0 < key.shape[2] <= LONGEST


def attend_short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """What each query sees: [batch, seq, heads, value_dim].

    Args:
        query: [batch, heads, seq, head_dim].
        key, value: [batch, kv_heads, keys, head_dim or value_dim].
        mask: [batch or 1, 1 or heads, seq, keys], True where a query sees a key.
        scale: of the scores; None is 1 / sqrt(head_dim).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seen: Tensor = _Short.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return seen.transpose(1, 2).contiguous()


class _Short(torch.autograd.Function):
    """One product for each of [batch * kv_heads], whose rows are all queries of its heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        scaled = _rows(torch.mul(query, scale, out=query.new_empty(query.shape)), key)
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        shares = _rows(_shares((scaled @ keys.mT).view(*query.shape[:3], -1), mask), key)
        ctx.save_for_backward(scaled, keys, values, shares)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return (shares @ values).view(*query.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> Any:
        scaled, keys, values, shares = ctx.saved_tensors
        query, key, value = ctx.shapes
        given = given.reshape(*shares.shape[:2], -1)
        scores = torch._softmax_backward_data(given @ values.mT, shares, -1, shares.dtype)
        return (
            (scores @ keys).mul_(ctx.scale).view(query) if ctx.needs_input_grad[0] else None,
            (scores.mT @ scaled).view(key),
            (shares.mT @ given).view(value),
            None,
            None,
        )


def _shares(scores: Tensor, mask: Tensor) -> Tensor:
    """What each query sees of each key; of a query that may see none, nothing, as torch has it."""
    # Added, as that is faster than filling in.
    hidden = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores.add_(hidden), dim=-1)
    blind = ~mask.any(dim=-1, keepdim=True)
    return shares.masked_fill_(blind, 0.0) if blind.any() else shares


def _rows(of_heads: Tensor, key: Tensor) -> Tensor:
    """[batch, heads, seq, width] as [batch * kv_heads, queries, width]."""
    return of_heads.view(key.shape[0] * key.shape[1], -1, of_heads.shape[-1])


AttentionInterface.register(NAME, sdpa)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[_BEFORE])
