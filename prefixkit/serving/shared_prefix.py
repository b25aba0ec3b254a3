"""A long prefix that several rows read where it is: kept once, beside their buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

from prefixkit.serving.buffer_names import shared_names
from prefixkit.serving.buffers import Buffers
from prefixkit.serving.graph import Graph
from prefixkit.serving.prefix_table import ServedPrefix


class SharedPrefix:
    """The place of one prefix, which another may take.

    Attributes:
        buffers: its keys and values; one row, with room for the longest so far.
    """

    def __init__(self, places: Graph, room: Callable[[int], Buffers]) -> None:
        """An empty place.

        Args:
            places: the graph that copies a prefix into buffers.
            room: makes buffers of one row with so many slots.
        """
        self._places, self._room, self.buffers = places, room, room(1)
        self._kept: ref[ServedPrefix] | None = None

    def keep(self, prefix: ServedPrefix) -> bool:
        """Put `prefix` in the place of the one before, which no row may be reading; says whether the place moved."""
        if self._kept is not None and self._kept() is prefix:
            return False
        place = self.buffers if prefix.length <= self.buffers.capacity else self._room(prefix.length)
        # Neither of the two, where the copy fails.
        self._kept = None
        place.place(self._places, 0, place.on_device(prefix))
        # What the session drops must not stay in memory for a comparison.
        self._kept = ref(prefix)
        moved, self.buffers = place is not self.buffers, place
        return moved

    def bind(self, binding: Any) -> None:
        """Let a graph read it."""
        self.buffers.lend(binding, shared_names(self.buffers.layers))
