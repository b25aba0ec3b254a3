"""The weighted mean of prefixes, number by number: a soup of runs that began alike.

Wortsman et al. 2022 (arXiv 2203.05482).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prefixkit.algebra.derived import Derived, derived, refuse_strangers, shared_task
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import InjectionRecord, Positions
from prefixkit.prefix import Array, Prefix


def average(prefixes: Sequence[Prefix], weights: Sequence[float] | None = None) -> Derived:
    """The mean of each number, computed in float64 and rounded once; equal prefixes give themselves.

    Args:
        weights: one a prefix, from 0, divided by their sum; equal ones without.

    Raises:
        ConfigError: fewer than two; weights that are none; other injections, lengths, positions or dtypes.
        MismatchError: another backbone.
    """
    refuse_strangers(prefixes, "average")
    shares = _shares(weights, len(prefixes))
    records = [_shared([prefix.manifest.injections for prefix in prefixes], index) for index in _indices(prefixes)]
    tensors = {name: _mean(name, [prefix.tensors[name] for prefix in prefixes], shares) for name in prefixes[0].tensors}
    task, notes = shared_task(prefixes)
    operation = {"operation": "average", "weights": shares}
    return derived(prefixes, operation, records, tensors, task=task, notes=notes)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else list(weights)
    total = sum(given)
    if len(given) != count or not all(weight >= 0 for weight in given) or not 0 < total < math.inf:
        expected = f"{count} numbers from 0, not all of them 0"
        raise ConfigError("average: weights", expected=expected, found=", ".join(f"{one:g}" for one in given))
    return [weight / total for weight in given]


def _indices(prefixes: Sequence[Prefix]) -> range:
    return range(len(prefixes[0].manifest.injections))


def _shared(columns: Sequence[Sequence[InjectionRecord]], index: int) -> InjectionRecord:
    """The record that all have at `index`, if they stand alike."""
    first = columns[0][index]
    others = [_like(first, records) for records in columns[1:]]
    for number, other in enumerate(others, start=2):
        for part in ("length", "positions", "reads"):
            expected, found = _said(getattr(first, part)), _said(getattr(other, part))
            if expected != found:
                where = f"average: prefix {number}: {first.kind}"
                raise ConfigError(where, expected=f"{part} {expected}, as in the first", found=found)
    tokens = first.token_ids if all(other.token_ids == first.token_ids for other in others) else None
    frozen = [record.frozen_slots for record in (first, *others) if record.frozen_slots is not None]
    return replace(first, token_ids=tokens, frozen_slots=min(frozen) if first.frozen_slots is not None else None)


def _said(value: object) -> str:
    if not isinstance(value, Positions):
        return "none" if value is None else str(value)
    prefix = "takes positions" if value.prefix_takes_positions else "takes none"
    return f"with text from {value.text_start} and a prefix that {prefix}"


def _like(first: InjectionRecord, records: Sequence[InjectionRecord]) -> InjectionRecord:
    place = (first.kind, first.stack, first.attention)
    return next(record for record in records if (record.kind, record.stack, record.attention) == place)


def _mean(name: str, arrays: Sequence[Array], shares: Sequence[float]) -> Array:
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        found = " and ".join(str(list(shape)) for shape in shapes)
        raise ConfigError(f"average: {name}", expected="tensors of one shape", found=found)
    total = np.zeros(arrays[0].shape, np.float64)
    for array, share in zip(arrays, shares, strict=True):
        total += share * array.astype(np.float64)
    return total.astype(arrays[0].dtype)
