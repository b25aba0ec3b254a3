"""A prefix for each row of a batch: several runs, or several users, in one forward pass. No method makes it, no file
holds it: it is what a backbone is handed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.injections.key_value_prefix import KeyValuePrefix


@dataclass(frozen=True, kw_only=True)
class RowPrefixes:
    """Keys and values of each row, filled up on the right where a row's prefix is shorter than the longest.

    Attributes:
        keys, values: one tensor a layer, [batch, kv_heads, prefix, head_dim].
        lengths: [batch], how many of the slots are a row's.
        starts: [batch], where its text starts counting.
        owner: [batch], which prefix it is.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor
    starts: Tensor
    owner: Tensor

    @property
    def length(self) -> int:
        """Slots of the longest."""
        return self.keys[0].shape[-2]


def row_prefixes(prefixes: Sequence[KeyValuePrefix], owner: Tensor) -> RowPrefixes:
    """`prefixes[owner[row]]` for each row, with gradients into them.

    Args:
        owner: [batch], on the device that the rows are on.
    """
    longest = max(prefix.length for prefix in prefixes)
    lengths = torch.tensor([prefix.length for prefix in prefixes], device=owner.device)
    starts = torch.tensor([prefix.positions.text_start for prefix in prefixes], device=owner.device)
    return RowPrefixes(
        keys=tuple(_rows(layer, longest, owner) for layer in zip(*(one.keys for one in prefixes), strict=True)),
        values=tuple(_rows(layer, longest, owner) for layer in zip(*(one.values for one in prefixes), strict=True)),
        lengths=lengths[owner],
        starts=starts[owner],
        owner=owner,
    )


def _rows(tensors: Sequence[Tensor], longest: int, owner: Tensor) -> Tensor:
    filled = [F.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors]
    return torch.stack(filled).to(owner.device)[owner]
