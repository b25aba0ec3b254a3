"""Encoded examples one after the other in a single row: no padding but what fills the row up to a bucket.

The row is of use where attention can keep examples apart; see `prefixkit.injections.packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.data.batches import IGNORED, Batch, Collate, EncodedExample
from prefixkit.data.labelled_batches import LabelledBatch, LabelledRow
from prefixkit.errors import DataError

BUCKET = 128
"""Rows are as long as a multiple of this: few lengths to compile for, and whole blocks of attention."""


@dataclass(frozen=True)
class PackedBatch(Batch):
    """int64 tensors, [1, T] each, with labels as in any batch; for a decoder no first token of an example has one.

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
    labels = [(*[IGNORED] * len(example.prompt), *example.target) for example in examples]
    return _labelled([example.words for example in examples], labels, pad_id, bucket)


def pack_masked(rows: Sequence[LabelledRow], *, pad_id: int = 0, bucket: int = BUCKET) -> PackedBatch:
    """One row of `rows` in order, filled up to a multiple of `bucket`; `labels` stand at the masks."""
    return _labelled([row.ids for row in rows], [row.labels for row in rows], pad_id, bucket)


def pack_inputs(rows: Sequence[Any], *, collate: Collate) -> LabelledBatch:
    """What `collate` makes of `rows`, for a head to answer, with all that is read in a single row.

    Its `inputs` are `input_ids`, `segments` and `positions` [1, T] as in a `PackedBatch`, and `attention_mask` [B, S],
    which says where the tokens stand in padded rows; everything else of the batch is of these.
    """
    batch: LabelledBatch = collate(rows)
    mask = batch.inputs["attention_mask"]
    pairs = zip(batch.inputs["input_ids"], mask.sum(dim=1).tolist(), strict=True)
    return replace(batch, inputs={**_row([ids[:length].tolist() for ids, length in pairs]), "attention_mask": mask})


def _labelled(ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad_id: int, bucket: int) -> PackedBatch:
    row, flat = _row(ids, pad_id, bucket), torch.tensor([label for each in labels for label in each])
    filling = row["input_ids"].shape[1] - len(flat)
    return PackedBatch(
        **row,
        attention_mask=(row["segments"] >= 0).long(),
        labels=F.pad(flat, (0, filling), value=IGNORED)[None],
    )


def _row(ids: Sequence[Sequence[int]], pad_id: int = 0, bucket: int = BUCKET) -> dict[str, Tensor]:
    """`input_ids`, `segments` and `positions`, [1, T] each."""
    lengths = torch.tensor([len(each) for each in ids])
    filling = -int(lengths.sum()) % bucket
    numbers = torch.arange(len(ids)).repeat_interleave(lengths)
    counted = [torch.arange(length) for length in (*lengths.tolist(), filling)]
    return {
        "input_ids": F.pad(torch.tensor([one for each in ids for one in each]), (0, filling), value=pad_id)[None],
        "segments": F.pad(numbers, (0, filling), value=-1)[None],
        "positions": torch.cat(counted)[None],
    }
