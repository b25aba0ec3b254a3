"""One pass of a graph over rows of buffers, bound once and run again and again, and what follows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from prefixkit.serving.buffer_names import INPUTS, OUTPUTS, SHARED_LENGTH
from prefixkit.serving.buffers import Buffers
from prefixkit.serving.graph import Graph
from prefixkit.serving.prefix_table import Array
from prefixkit.serving.shared_prefix import SharedPrefix


class Next:
    """What follows the newest token of each row of a pass.

    Attributes:
        tokens: [rows], the likeliest.
    """

    def __init__(self, logits: Any, tokens: Any) -> None:
        self._logits, self.tokens = logits, tokens.numpy().copy()

    @cached_property
    def logits(self) -> Array:
        """[rows, vocab], float32. They stay on the device until somebody wants them, before the next pass."""
        # The next pass writes to the same place.
        found: Array = self._logits.numpy().copy()
        return found


class _Input:
    """Integers at a fixed address where a graph runs."""

    def __init__(self, graph: Graph, shape: tuple[int, ...]) -> None:
        self.value, self._sent = graph.room(shape, np.int64), graph.device != "cpu"
        # On a CPU this is the input itself: nothing is to be sent.
        self._array = np.zeros(shape, np.int64) if self._sent else self.value.numpy()

    def take(self, numbers: Array) -> None:
        self._array[...] = numbers
        if self._sent:
            self.value.update_inplace(self._array)


class Pass:
    """A pass over a range of rows, with everything at fixed addresses, to be run again and again."""

    def __init__(
        self, graph: Graph, buffers: Buffers, rows: slice, seq: int, shared: SharedPrefix | None = None
    ) -> None:
        self.graph, self.rows, count = graph, rows, rows.stop - rows.start
        self._binding, self._given = graph.session.io_binding(), dict[str, _Input]()
        self._size = 0
        self.take(seq)
        self._room((INPUTS["write_index"], INPUTS["last"], SHARED_LENGTH), (count,))
        if shared is not None:
            shared.bind(self._binding)
        vocabulary = next(one.shape[1] for one in graph.session.get_outputs() if one.name == OUTPUTS["logits"])
        self._logits = graph.room((count, vocabulary), np.float32)
        self._tokens = graph.room((count,), np.int64)
        self._binding.bind_ortvalue_output(OUTPUTS["logits"], self._logits)
        self._binding.bind_ortvalue_output(OUTPUTS["token"], self._tokens)
        buffers.bind(self._binding, rows.start, rows.stop)

    def take(self, seq: int) -> None:
        """Run on `seq` tokens a row from now on."""
        if seq != self._size:
            self._size = seq
            self._room((INPUTS["input_ids"], INPUTS["position_ids"]), (self.rows.stop - self.rows.start, seq))

    def run(self, given: Mapping[str, Array]) -> Next:
        """Run on inputs `given` by name."""
        for name, place in self._given.items():
            place.take(given[name])
        self.graph.run_bound(self._binding)
        return Next(self._logits, self._tokens)

    def _room(self, names: Sequence[str], shape: tuple[int, ...]) -> None:
        for name in self.graph.inputs.intersection(names):
            self._given[name] = _Input(self.graph, shape)
            self._binding.bind_ortvalue_input(name, self._given[name].value)
