"""The prefixes of a packed row: examples one after the other in a single row, each with its own. No method makes it, no
file holds it: it is what a backbone is handed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.injections.key_value_prefix import KeyValuePrefix


@dataclass(frozen=True, kw_only=True)
class PackedPrefixes:
    """Keys and values of several prefixes, one after the other, and which tokens of the row are to see them.

    What fills the row up behind its examples counts as one more example, of nobody.

    Attributes:
        keys, values: one tensor a layer, [kv_heads, slots, head_dim].
        slot_owners: [slots], which prefix a slot is of.
        slot_places: [slots], how many slots of that prefix stand before it.
        examples: [seq], which example a token is of.
        owners: [seq], which prefix it sees; their number, which is none, where the row is filled up.
        places: [seq], how many slots of that prefix and tokens of its example stand before it.
        positions: [1, seq], its position id.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    slot_owners: Tensor
    slot_places: Tensor
    examples: Tensor
    owners: Tensor
    places: Tensor
    positions: Tensor

    @property
    def length(self) -> int:
        """Slots of all of them."""
        return len(self.slot_owners)


def packed_prefixes(
    prefixes: Sequence[KeyValuePrefix], owner: Tensor, segments: Tensor, positions: Tensor
) -> PackedPrefixes:
    """`prefixes[owner[example]]` for each example of a packed row, with gradients into them.

    Args:
        owner: [examples], on the device that the row is on.
        segments: [1, seq], which example a token is of; -1 where the row is filled up.
        positions: [1, seq], how many tokens of its example stand before it.
    """
    device, real, index = owner.device, segments[0] >= 0, positions[0]
    examples = segments[0].where(real, len(owner))
    owners = F.pad(owner, (0, 1), value=len(prefixes))[examples]
    lengths = [prefix.length for prefix in prefixes]
    starts = [prefix.positions.text_start for prefix in prefixes]
    return PackedPrefixes(
        keys=tuple(_in_a_row(layer, device) for layer in zip(*(one.keys for one in prefixes), strict=True)),
        values=tuple(_in_a_row(layer, device) for layer in zip(*(one.values for one in prefixes), strict=True)),
        slot_owners=torch.cat([torch.full((length,), one) for one, length in enumerate(lengths)]).to(device),
        slot_places=torch.cat([torch.arange(length) for length in lengths]).to(device),
        examples=examples,
        owners=owners,
        places=torch.tensor([*lengths, 0], device=device)[owners] + index,
        # A bucket may be longer than the context.
        positions=(torch.tensor([*starts, 0], device=device)[owners] + index).where(real, 0)[None],
    )


def _in_a_row(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([tensor.to(device) for tensor in tensors], dim=1)
