"""Some of a prefix's slots."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prefixkit.algebra.derived import Derived, derived
from prefixkit.algebra.rotation import Rotation
from prefixkit.algebra.slots import moved, placed, refuse_unmovable, slots_of, turned
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import InjectionRecord
from prefixkit.prefix import Array, Prefix


def cut(prefix: Prefix, start: int | None, stop: int | None, *, rotations: Sequence[Rotation] | None = None) -> Derived:
    """The slots `start` to `stop`, that one excluded, as a prefix of their own: it begins at position 0.

    Leading slots stay as they are, bit for bit. Of others, keys that turn with their position are turned back, so that
    the last slots meet the text as before. Keys and values of a real text keep what they saw of the slots before them.

    Args:
        start, stop: as Python slices: None is the begin or the end, negative ones count from the end, what lies
            outside is left out. Each injection is cut by its own length.
        rotations: as for `compose`; needed where keys turn and do not begin at 0.

    Raises:
        ConfigError: no such slots, an injection without any, keys that would have to turn.
        FormatError: keys that, turned, are beyond their dtype.
    """
    spans = spans_of(prefix, start, stop)
    if any(span.start for span in spans):
        refuse_unmovable(prefix, "slice")
    records, tensors, was_turned = [], {}, False
    for (record, axes), span in zip(slots_of(prefix, "slice"), spans, strict=True):
        rest = Prefix(prefix.manifest, {name: _rows(prefix.tensors[name], axis, span) for name, axis in axes.items()})
        tensors.update({name: moved(rest, record, name, -span.start, rotations, "slice") for name in axes})
        records.append(_shortened(record, span))
        was_turned = was_turned or (span.start > 0 and turned(prefix, record, rotations))
    notes = ("keys turned to positions from 0",) if was_turned else ()
    slots = [[span.start, span.stop] for span in spans]
    operation = {"operation": "slice", "slots": slots, "keys_turned": was_turned}
    return derived([prefix], operation, records, tensors, task=prefix.manifest.task, notes=notes)


def spans_of(prefix: Prefix, start: int | None, stop: int | None) -> list[range]:
    """The slots that `cut` takes of each injection.

    Raises:
        ConfigError: none of some injection, or one that has no slots.
    """
    spans = []
    for record, _ in slots_of(prefix, "slice"):
        span = range(*slice(start, stop).indices(record.length or 0))
        if not span:
            where = ".".join(part for part in (record.stack, record.attention) if part) or record.kind
            found = f"none in {_shown(start)}:{_shown(stop)}"
            raise ConfigError(f"slice: {where}", expected=f"some of {record.length} slots", found=found)
        spans.append(span)
    return spans


def bounds(text: str) -> tuple[int | None, int | None]:
    """START:STOP as Python writes it: either may be missing or count from the end.

    Raises:
        ConfigError: no such text.
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(_NUMBER.fullmatch(part) for part in parts):
        step = "write slots as 0:16, :16 or 16:"
        raise ConfigError("slice", expected="START:STOP", found=repr(text)[:80], next_step=step)
    start, stop = (int(part) if part.strip() else None for part in parts)
    return start, stop


_NUMBER = re.compile(r" *(-?[0-9]{1,15})? *")
"""ASCII: Python would read other scripts' digits, too."""


def _shown(bound: int | None) -> str:
    return "" if bound is None else str(bound)


def _rows(array: Array, axis: int, span: range) -> Array:
    chosen = slice(span.start, span.stop)
    return np.ascontiguousarray(array[chosen] if axis == 0 else array[:, chosen])


def _shortened(record: InjectionRecord, span: range) -> InjectionRecord:
    frozen, tokens = record.frozen_slots, record.token_ids
    return replace(
        record,
        length=len(span),
        positions=placed(record, len(span), "slice"),
        frozen_slots=None if frozen is None else max(0, min(frozen, span.stop) - span.start),
        token_ids=None if tokens is None else tokens[span.start : span.stop],
    )
