"""How the examples of a batch lie before the backbone: in padded rows, or one after the other in a packed row.

Losses and gradients of a batch are the same. A packed row has no padding, and is for CUDA, where attention skips
whatever a token does not see; on a CPU rows of like length are faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefixkit.backbones import packed
from prefixkit.backbones.attention import uses_registry
from prefixkit.backbones.backbone import Backbone
from prefixkit.data.batches import Batch, Collate, Order
from prefixkit.data.packing import PackedBatch, pack, pack_inputs, pack_masked
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import (
    Injection,
    KeyValuePrefix,
    Received,
    Several,
    TaskHead,
    packed_prefixes,
    part_of,
    parts_of,
    row_prefixes,
)
from prefixkit.training.examples import collate_for


def chosen(
    layout: str, task: TaskRecord, backbone: Backbone, given: Iterable[Injection | None]
) -> tuple[Collate, str | None]:
    """What makes the batches of a run, and a sentence where they are padded although a packed row would be faster.

    Args:
        layout: `auto` packs on CUDA, where nothing is in the way.
        given: everything that the backbone will receive in front of a batch.

    Raises:
        ConfigError: packed rows were asked for, and something is in the way.
    """
    padded = collate_for(task, backbone)
    if layout == "padded" or (layout == "auto" and not _packs_faster(backbone)):
        return padded, None
    reason = obstacle(task, backbone, given)
    if reason is not None and layout == "packed":
        raise ConfigError("layout", expected="what can be packed", found=reason, next_step="use layout=padded")
    if reason is not None:
        return padded, f"batches are padded: no packed row for {reason}"
    if task.answer is not None:
        return partial(pack_inputs, collate=padded), None
    return (pack_masked if backbone.kind == "encoder" else pack), None


def _packs_faster(backbone: Backbone) -> bool:
    return backbone.device.type == "cuda"


def packs(collate: Collate) -> bool:
    """Whether the batches that `collate` makes lie in a packed row."""
    return getattr(collate, "func", collate) in (pack, pack_masked, pack_inputs)


def order(collate: Collate, task: TaskRecord, backbone: Backbone) -> Order:
    """Which examples of a run come together in the batches that `collate` makes."""
    if packs(collate):
        return "random"
    return "beginnings" if backbone.reads_tries and task.answer is None else "length"


def obstacle(task: TaskRecord, backbone: Backbone, given: Iterable[Injection | None]) -> str | None:
    """Why examples cannot lie in a packed row; None where they can."""
    family = backbone.identity.family
    if task.image is not None:
        return f"{family}, whose inputs all have one length"
    if backbone.paired:
        # Of their own each: cross-attention would need a third mask, and T5's bias one for each head.
        return f"{family}, whose prompts and targets are two sequences"
    if not uses_registry(backbone.model):
        return f"{family}, whose attention goes its own way in transformers"
    reason = packed.obstacle(backbone.model)
    if reason is not None:
        return f"{family}: {reason}"
    if all(is_prefix(backbone.fold(one)) for one in given if one is not None):
        return None
    return "something else than keys and values before the text"


def is_prefix(received: Injection) -> bool:
    """Whether it is keys and values before the text, and at most a head behind it."""
    prefix = part_of(received, KeyValuePrefix)
    others = [part for part in parts_of(received) if part is not prefix]
    alone = all(isinstance(part, TaskHead) for part in others)
    return prefix is not None and prefix.placement == "prepend" and alone


def states(backbone: Backbone, inputs: Mapping[str, Tensor], received: Injection | None) -> Tensor:
    """The final states [batch, seq, hidden] of `inputs` in padded rows, however they lie."""
    if "segments" not in inputs:
        return backbone.states(inputs, received)
    owner = torch.zeros(len(inputs["attention_mask"]), dtype=torch.long, device=backbone.device)
    return states_of_several(backbone, inputs, [_prefix(backbone, received)], owner)


def states_of_several(
    backbone: Backbone, inputs: Mapping[str, Tensor], prefixes: Sequence[KeyValuePrefix], owner: Tensor
) -> Tensor:
    """The same with `prefixes[owner[row]]` before each row; all of it is on the backbone's device."""
    if "segments" not in inputs:
        return backbone.states(inputs, row_prefixes(prefixes, owner))
    segments, mask = inputs["segments"], inputs["attention_mask"].bool()
    row = {"input_ids": inputs["input_ids"], "attention_mask": (segments >= 0).long()}
    several = packed_prefixes(prefixes, owner, segments, inputs["positions"])
    found = backbone.states(row, several)[0, segments[0] >= 0]
    return found.new_zeros(*mask.shape, found.shape[1]).index_put(mask.nonzero(as_tuple=True), found)


def laid(backbone: Backbone, batch: Any, received: Received | None) -> Received | None:
    """`received` as a backbone takes it beside `batch`."""
    if not isinstance(batch, PackedBatch) or isinstance(received, Several):
        return received
    return laid_each(backbone, batch, received)


def laid_each(backbone: Backbone, batch: Batch, received: Injection | None) -> Several:
    """The prefix of `received` for each example of `batch`, as runs side by side have theirs."""
    owner = torch.zeros(batch.examples, dtype=torch.long, device=backbone.device)
    return laid_several(batch, [_prefix(backbone, received)], owner)


def _prefix(backbone: Backbone, received: Injection | None) -> KeyValuePrefix:
    prefix = part_of(None if received is None else backbone.fold(received), KeyValuePrefix)
    assert prefix is not None, "without one the examples of a row would see each other"
    return prefix


def laid_several(batch: Batch, prefixes: Sequence[KeyValuePrefix], owner: Tensor) -> Several:
    """`prefixes[owner[example]]` for each example of `batch`; `owner` is on the backbone's device."""
    if isinstance(batch, PackedBatch):
        return packed_prefixes(prefixes, owner, batch.segments.to(owner.device), batch.positions.to(owner.device))
    return row_prefixes(prefixes, owner)


def owners(batch: Batch, owner: Tensor) -> Tensor:
    """[batch, seq]: the owner of each token, where it is of an example."""
    if isinstance(batch, PackedBatch):
        return owner[batch.segments.to(owner.device)]
    return owner[:, None].expand(batch.labels.shape)
