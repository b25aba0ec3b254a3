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
        self._kept: Callable[[], ServedPrefix | None] = lambda: None

    def keep(self, prefix: ServedPrefix) -> bool:
        """Put `prefix` in the place of the one before, which no row may be reading; says whether the place moved."""
        if prefix is self._kept():
            return False
        moved = prefix.length > self.buffers.capacity
        if moved:
            self.buffers = self._room(prefix.length)
        self.buffers.place(self._places, 0, self.buffers.on_device(prefix))
        # What the session drops must not stay in memory for this comparison.
        self._kept = ref(prefix)
        return moved

    def bind(self, binding: Any) -> None:
        """Let a graph read it."""
        self.buffers.lend(binding, shared_names(self.buffers.layers))
