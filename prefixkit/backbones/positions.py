"""Where each token of a batch stands, counted in real tokens, whatever padding and cache surround it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def query_index(tokens: Tensor, keywords: dict[str, Any]) -> Tensor:
    """[batch, seq]: how many real tokens of its row precede each query token; -1 or repeated on padding."""
    given: Tensor | None = keywords.get("position_ids")
    if given is not None:
        return given
    batch, seq = tokens.shape[:2]
    mask = keywords.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1)[:, -seq:]
    cache = keywords.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(seq, device=tokens.device) + past).expand(batch, -1)
