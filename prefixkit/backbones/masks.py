"""Attention masks from the attention mask alone, so that padding may lie anywhere, also between prefix and text."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(attention_mask: Tensor, seq: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """The additive mask [batch, 1, seq, total] of the last `seq` of `total` cache slots.

    A query sees the real tokens that do not come after it, with a `window` the last `window` of them, itself included.
    Tokens are counted, not slots: `transformers` takes a slot's index for its position, which is wrong when padding
    lies between prefix and text.

    Args:
        attention_mask: [batch, total], 1 for a real token or prefix slot, 0 for padding.
        seq: how many of the slots are queries.
        dtype: the dtype of the attention scores.
        window: sliding window in tokens, None for full attention.
    """
    count = attention_mask.long().cumsum(-1)
    distance = count[:, -seq:, None] - count[:, None, :]
    visible = attention_mask.bool()[:, None, :] & (distance >= 0)
    if window is not None:
        visible = visible & (distance < window)
    # Padding sees itself: a softmax over nothing would be NaN in half precision, and spread through its values.
    slots = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    visible = visible | (slots[-seq:, None] == slots)
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
