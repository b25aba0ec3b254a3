"""Encoded examples one after the other in a single row: no padding but what fills the row up to a bucket.

The row is of use where attention can keep examples apart; see `prefixkit.injections.packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.data.batches import IGNORED, Batch, EncodedExample
from prefixkit.errors import DataError

BUCKET = 128
"""Rows are as long as a multiple of this: few lengths to compile for, and whole blocks of attention."""


@dataclass(frozen=True)
class PackedBatch(Batch):
    """int64 tensors, [1, T] each, with labels as in any batch; no first token of an example has one.

    Attributes:
        segments: which example a token is of; -1 where the row is filled up.
        positions: how many tokens of its example stand before it.
    """

    segments: Tensor
    positions: Tensor

    @property
    def examples(self) -> int:
        """How many there are."""
        return int(self.segments.max()) + 1


def pack(examples: Sequence[EncodedExample], *, pad_id: int = 0, bucket: int = BUCKET) -> PackedBatch:
    """One row of `examples` in order, filled up to a multiple of `bucket`. Any id of the vocabulary fills it.

    Raises:
        DataError: an example without a prompt: in a row of its own nothing would predict its first token.
    """
    if not all(example.prompt for example in examples):
        raise DataError("packed row", expected="a prompt of a token or more", found="an empty one")
    lengths = torch.tensor([len(example) for example in examples])
    filling = -int(lengths.sum()) % bucket
    words = [word for example in examples for word in example.words]
    labels = [label for example in examples for label in (*[IGNORED] * len(example.prompt), *example.target)]
    numbers = torch.arange(len(examples)).repeat_interleave(lengths)
    counted = [torch.arange(length) for length in (*lengths.tolist(), filling)]
    segments = F.pad(numbers, (0, filling), value=-1)[None]
    return PackedBatch(
        input_ids=F.pad(torch.tensor(words), (0, filling), value=pad_id)[None],
        attention_mask=(segments >= 0).long(),
        labels=F.pad(torch.tensor(labels), (0, filling), value=IGNORED)[None],
        segments=segments,
        positions=torch.cat(counted)[None],
    )
