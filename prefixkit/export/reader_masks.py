"""The masks of a model that reads in both directions: over the prefix, then over what it reads."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def masks(model: PreTrainedModel, real: Tensor, prefix: int, dtype: torch.dtype) -> dict[int | None, Tensor]:
    """Additive masks [batch, 1, 1 or seq, prefix + seq] by sliding window, that of full attention under None.

    Every token sees the prefix; a window counts the real tokens of what is read.

    Args:
        real: [batch, prefix + seq], 1 for a real slot or token, 0 for padding.
    """
    window = getattr(model.config, "sliding_window", None)
    found: dict[int | None, Tensor] = {None: _additive(real.bool()[:, None], dtype)}
    if window is not None:
        # Layers are told one more: the first distance that they do not see.
        found[window + 1] = _additive(_near(real, prefix, window) & real.bool()[:, None], dtype)
    return found


def _near(real: Tensor, prefix: int, window: int) -> Tensor:
    """[batch, seq, prefix + seq]: the prefix, and tokens at most `window` away."""
    count = real[:, prefix:].cumsum(dim=1)
    near = (count[:, :, None] - count[:, None, :]).abs() <= window
    before = torch.ones_like(real[:, :prefix], dtype=torch.bool)[:, None].expand(-1, near.shape[1], -1)
    return torch.cat([before, near], dim=2)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
