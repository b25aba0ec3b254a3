"""Some of a prefix's slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prefixkit.algebra.derived import Derived, derived
from prefixkit.algebra.rotation import Rotation
from prefixkit.algebra.slots import moved, placed, slots_of, turns
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import InjectionRecord
from prefixkit.prefix import Array, Prefix


def cut(prefix: Prefix, start: int, stop: int, *, rotations: Sequence[Rotation] | None = None) -> Derived:
    """The slots `start` to `stop`, that one excluded, as a prefix of their own: it begins at position 0.

    Leading slots stay as they are, bit for bit. Of others, keys that turn with their position are turned back, so that
    the last slots meet the text as before. Keys and values of a real text keep what they saw of the slots before them.

    Args:
        rotations: as for `compose`; needed where keys turn and `start` is not 0.

    Raises:
        ConfigError: no such slots, an injection without any, keys that would have to turn.
    """
    records, tensors, turned = [], {}, False
    for record, axes in slots_of(prefix, "slice"):
        _refuse_outside(record.length or 0, start, stop)
        chosen = {name: _rows(prefix.tensors[name], axis, start, stop) for name, axis in axes.items()}
        rest = Prefix(prefix.manifest, chosen)
        tensors.update({name: moved(rest, record, name, -start, rotations) for name in chosen})
        records.append(_shortened(record, start, stop))
        turned = turned or (start > 0 and turns(prefix, record))
    notes = ("keys turned to positions from 0",) if turned else ()
    operation = {"operation": "slice", "start": start, "stop": stop, "keys_turned": turned}
    made = derived([prefix], operation, records, tensors, task=prefix.manifest.task)
    return Derived(made, notes)


def bounds(text: str, length: int) -> tuple[int, int]:
    """START:STOP as Python reads it in a prefix of `length` slots: either may be missing or count from the end.

    Raises:
        ConfigError: no such text.
    """
    parts = text.split(":")
    try:
        start, stop = (int(part) if part.strip() else None for part in parts)
    except ValueError:
        step = "write slots as 0:16, :16 or 16:"
        raise ConfigError("slice", expected="START:STOP", found=repr(text)[:80], next_step=step) from None
    first, last = 0 if start is None else start, length if stop is None else stop
    return first + length * (first < 0), last + length * (last < 0)


def _refuse_outside(length: int, start: int, stop: int) -> None:
    if not 0 <= start < stop <= length:
        expected = f"START below STOP, within 0 and {length}"
        raise ConfigError("slice", expected=expected, found=f"{start}:{stop}")


def _rows(array: Array, axis: int, start: int, stop: int) -> Array:
    rows = array[start:stop] if axis == 0 else array[:, start:stop]
    return np.ascontiguousarray(rows)


def _shortened(record: InjectionRecord, start: int, stop: int) -> InjectionRecord:
    frozen, tokens = record.frozen_slots, record.token_ids
    return replace(
        record,
        length=stop - start,
        positions=placed(record, stop - start, "slice"),
        frozen_slots=None if frozen is None else max(0, min(frozen, stop) - start),
        token_ids=None if tokens is None else tokens[start:stop],
    )
