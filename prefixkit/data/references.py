"""Examples grouped for evaluation: every input once, with all the texts that were written for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from prefixkit.data.readers import Example
from prefixkit.task import Fields


@dataclass(frozen=True)
class ReferenceGroup:
    """One input and its references, in the order of the file."""

    fields: Fields
    references: tuple[str, ...]
    where: str = "example"
    """File and line of the first reference."""


def group_references(examples: Iterable[Example]) -> list[ReferenceGroup]:
    """One group an input, in order of first occurrence. Equal inputs meet wherever they stand in the file."""
    grouped: dict[str, list[Example]] = {}
    for example in examples:
        key = json.dumps(dict(example.fields), sort_keys=True)
        grouped.setdefault(key, []).append(example)
    return [
        ReferenceGroup(group[0].fields, tuple(example.target for example in group), group[0].where)
        for group in grouped.values()
    ]
