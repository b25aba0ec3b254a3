"""Several injections at once, such as a prefix and a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from prefixkit.format.manifest import Positions
from prefixkit.injections.key_value_prefix import KeyValuePrefix, KeyValuePrefixes
from prefixkit.injections.packed import PackedPrefixes
from prefixkit.injections.parameters import ParameterDelta, TaskHead
from prefixkit.injections.prompts import EmbeddingPrompt, HiddenPrompt
from prefixkit.injections.rows import RowPrefixes
from prefixkit.prefix import Array

One = KeyValuePrefix | EmbeddingPrompt | HiddenPrompt | ParameterDelta | TaskHead
Kind = TypeVar("Kind", bound=One)
NOWHERE = Positions(text_start=0, prefix_takes_positions=False)
"""Where text starts behind what takes no place."""


@dataclass(frozen=True, kw_only=True)
class Combined:
    """Injections of different kinds, for one backbone.

    Attributes:
        parts: at most one of a kind.
    """

    parts: tuple[One, ...]

    @property
    def length(self) -> int:
        """The number of places that the prompt or prefix takes."""
        return max((part.length for part in self.parts), default=0)

    @property
    def positions(self) -> Positions:
        """Where the text starts."""
        return positions_of(self)

    def arrays(self) -> dict[str, Array]:
        """The tensors of all parts under the names that a prefix file gives them."""
        return {name: array for part in self.parts for name, array in part.arrays().items()}


Injection = KeyValuePrefix | KeyValuePrefixes | EmbeddingPrompt | HiddenPrompt | ParameterDelta | TaskHead | Combined
"""The union of injections that a method may return. It is closed: a new kind means a new version of the schema."""
Several = RowPrefixes | PackedPrefixes
"""Prefixes of several runs, or users, in one forward pass."""
Received = Injection | Several
"""What a backbone may be handed."""


def parts_of(received: Received | None) -> tuple[One, ...]:
    """`received` as single injections, in order; several prefixes are none."""
    if received is None or isinstance(received, Several):
        return ()
    return received.parts if isinstance(received, (Combined, KeyValuePrefixes)) else (received,)


def part_of(received: Received | None, kind: type[Kind]) -> Kind | None:
    """The part of that kind; None where there is none."""
    return next((part for part in parts_of(received) if isinstance(part, kind)), None)


def joined(parts: tuple[One, ...]) -> Injection:
    """`parts` as one injection: itself where it is alone."""
    return parts[0] if len(parts) == 1 else Combined(parts=parts)


def positions_of(received: Injection | None) -> Positions:
    """Where text starts behind `received`."""
    placed = (part for part in parts_of(received) if not isinstance(part, (ParameterDelta, TaskHead)))
    return next((part.positions for part in placed), NOWHERE)
