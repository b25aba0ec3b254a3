"""Where the rows of a pass write into buffers of a fixed capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Form = Literal["scattered", "grouped", "shared"]
KeyValue = tuple[Tensor, Tensor]
"""A key and a value."""


@dataclass(frozen=True)
class Writing:
    """Where the rows of a pass write.

    Attributes:
        form: the operators to use.
        index: [batch], the slot of each row's first new token.
        buffers: keys and values of each layer, [batch, kv_heads, capacity, head_dim].
        shared: those of a prefix that rows share, [1, kv_heads, prefix, head_dim]; for the form `shared`.
        seen: [batch], how many of its slots each row sees.
        scales: of each layer's keys and values, [kv_heads, 1, head_dim]; none where buffers have the model's dtype.
        written: by layer, the same with what is new; filled by the pass.
    """

    form: Form
    index: Tensor
    buffers: Sequence[KeyValue]
    shared: Sequence[KeyValue] = ()
    seen: Tensor | None = None
    scales: Sequence[KeyValue] = ()
    written: dict[int, KeyValue] = field(default_factory=dict)
