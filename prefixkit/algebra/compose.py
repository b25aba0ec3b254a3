"""Prefixes one behind the other.

What is exact. Soft prompts stand as vectors: the model computes them anew, and what comes out is the prompt of both.
Keys and values of a second prefix were made without the first: they stay what they are and see nothing of it, as
documents that are cached apart (Gim et al. 2024, Prompt Cache, arXiv 2311.04934). In a model with rotary positions they
are turned to the positions where they now stand, so that the last part meets the text as it does alone. Of learned
positions (GPT-2) trained keys know nothing; those of a real text keep the positions where it was read. Where a prefix
takes no positions nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from prefixkit.algebra.derived import Derived, derived, refuse_strangers, shared_task
from prefixkit.algebra.rotation import Rotation
from prefixkit.algebra.slots import moved, placed, refuse_too_long, refuse_unmovable, slots_of, turned, with_room
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import InjectionRecord
from prefixkit.prefix import Array, Prefix


def compose(prefixes: Sequence[Prefix], *, rotations: Sequence[Rotation] | None = None) -> Derived:
    """The slots of all `prefixes`, in their order, and the text behind the last one.

    Args:
        rotations: one a layer of the decoder, from `prefixkit.backbones.rotation`; needed where keys turn.

    Raises:
        ConfigError: fewer than two, other injections or dtypes, no slots, no room left, keys that would have to turn.
        FormatError: keys that, turned, are beyond their dtype.
        MismatchError: another backbone.
    """
    refuse_strangers(prefixes, "compose")
    parts = [sorted(slots_of(prefix, "compose"), key=_place) for prefix in prefixes]
    refuse_unmovable(prefixes[0], "compose")
    columns = list(zip(*parts, strict=True))
    records = [_joined([record for record, _ in column]) for column in columns]
    for record in records:
        refuse_too_long(prefixes[0], record.length or 0, "compose")
    tensors: dict[str, Array] = {}
    for column in columns:
        tensors.update(_concatenated(prefixes, column, rotations))
    operation = {
        "operation": "compose",
        "lengths": [[record.length for record, _ in column] for column in columns],
        "positions": [_fate(prefixes[0], record, rotations) for record in records],
    }
    task, notes = shared_task(prefixes)
    told = dict.fromkeys(_told(prefixes[0], record, rotations) for record in records)
    room = with_room(task, prefixes[0].manifest.backbone, records)
    return derived(prefixes, operation, records, tensors, task=room, notes=(*told, *notes))


_Part = tuple[InjectionRecord, dict[str, int]]


def _place(part: _Part) -> tuple[str, str, str]:
    record, _ = part
    return record.kind, record.stack or "", record.attention or ""


def _concatenated(
    prefixes: Sequence[Prefix], column: Sequence[_Part], rotations: Sequence[Rotation] | None
) -> dict[str, Array]:
    starts = accumulate((record.length or 0 for record, _ in column), initial=0)
    parts = list(zip(prefixes, (record for record, _ in column), starts, strict=False))

    def joined(name: str, axis: int) -> Array:
        arrays = [
            moved(prefix, record, name, start, rotations, f"compose: prefix {number}")
            for number, (prefix, record, start) in enumerate(parts, start=1)
        ]
        return np.concatenate(arrays, axis)

    return {name: joined(name, axis) for name, axis in column[0][1].items()}


def _joined(records: Sequence[InjectionRecord]) -> InjectionRecord:
    first, length = records[0], sum(record.length or 0 for record in records)
    placed_all = {placed(record, length, "compose") for record in records}
    if len(placed_all) > 1:
        raise ConfigError("compose", expected="prefixes that all take positions, or none", found="some of each")
    known = all(record.token_ids is not None for record in records)
    tokens = tuple(token for record in records for token in record.token_ids or ())
    return replace(
        first,
        length=length,
        positions=placed_all.pop(),
        frozen_slots=None if first.frozen_slots is None else _frozen(records),
        token_ids=tokens if known else None,
    )


def _fate(prefix: Prefix, record: InjectionRecord, rotations: Sequence[Rotation] | None) -> str:
    """What became of the joined `record`: the model computes vectors anew, keys were `turned` or are as they were."""
    if record.kind != "key_value_prefix":
        return "computed"
    return "turned" if turned(prefix, record, rotations) else "kept"


def _told(prefix: Prefix, record: InjectionRecord, rotations: Sequence[Rotation] | None) -> str:
    """What is exact in the joined `record`, and what is a choice."""
    apart = "each part as it is alone, seeing nothing of those before it (a choice)"
    fate = _fate(prefix, record, rotations)
    if fate == "computed":
        return "the model reads the vectors of all parts as one prompt"
    if fate == "turned":
        return f"keys turned to the positions where they now stand; {apart}"
    if record.positions is not None and record.positions.prefix_takes_positions:
        return f"keys as they are, those of a real text still of the positions where it was read (a choice); {apart}"
    return f"keys as they are, as the prefixes take no positions; {apart}"


def _frozen(records: Sequence[InjectionRecord]) -> int:
    """Leading slots that training left alone: those of the second count where the first has no others."""
    total = 0
    for record in records:
        total += record.frozen_slots or 0
        if record.frozen_slots != record.length:
            break
    return total
