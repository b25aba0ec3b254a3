"""T5's bias by distance as a table over distances, for positions that differ from row to row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """The bias of one stack, which its first layer makes for all of them (Raffel et al. 2020, section 2.1).

    A distance's bucket is found with logarithms, which runtimes round differently at the edge of a bucket; so buckets
    are listed here, by distance, as PyTorch finds them. All distances from the largest one on share theirs.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.weights = attention.relative_attention_bias
        self.farthest = int(attention.relative_attention_max_distance)
        distances = torch.arange(-self.farthest, self.farthest + 1, device=self.weights.weight.device)
        buckets = attention._relative_position_bucket(
            distances,
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=self.farthest,
        )
        self.register_buffer("buckets", buckets)

    @staticmethod
    def of(stack: nn.Module) -> RelativeBias | None:
        """That of an encoder or decoder; None where it has absolute positions."""
        attention = biased(stack)
        return None if attention is None else RelativeBias(attention)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[batch, heads, seq, total]: what attention adds, by positions [batch, seq] and [batch, total]."""
        distances = (keys[:, None] - queries[:, :, None]).clamp(-self.farthest, self.farthest)
        assert isinstance(self.buckets, Tensor)
        bias: Tensor = self.weights(self.buckets[distances + self.farthest]).permute(0, 3, 1, 2)
        return bias


def biased(stack: nn.Module) -> nn.Module | None:
    """The attention layer of `stack` that makes the bias, None without one."""
    return next((module for module in stack.modules() if getattr(module, "has_relative_attention_bias", False)), None)
