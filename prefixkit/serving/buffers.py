"""Keys and values of many texts, at fixed addresses: a place for each, which a graph reads and writes where it is.

[rows, kv_heads, capacity, head_dim] a tensor. A range of rows is a tensor of its own, at an address inside, so that a
graph can work on some rows while the others keep what they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.serving.buffer_names import INPUTS, OUTPUTS, prefix_names
from prefixkit.serving.cache_scales import CacheScales
from prefixkit.serving.graph import Graph, first_line, per_layer
from prefixkit.serving.prefix_table import Array, ServedPrefix

_BFLOAT16 = 16


class Buffers:
    """Buffers for `rows` texts of up to `capacity` slots each, on the device of the graphs that use them.

    Attributes:
        layers: how many have keys and values.
        bytes: of all of them.
    """

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        rows: int,
        capacity: int,
        dtype: str,
        device: str,
        scales: CacheScales | None = None,
    ) -> None:
        self.rows, self.capacity, self.device, self.dtype = rows, capacity, device, np.dtype(dtype)
        self.layers, self._scales = len(layers), scales
        self._shapes = [(layer.kv_heads, capacity, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
        try:
            self._values = [self._value((rows, *shape)) for shape in self._shapes]
        except (MemoryError, RuntimeError) as error:  # of numpy; of onnxruntime for its device, which may mean others
            row, found = self.bytes // rows >> 20, f"not so much ({first_line(error)})"
            expected, step = f"memory for {rows} rows of {row:,} MiB each", "take fewer rows, or a smaller capacity"
            raise ConfigError("buffers", expected=expected, found=found, next_step=step) from error
        self._past, self._present = (
            list(per_layer(names, which, len(layers))) for names, which in ((INPUTS, "past"), (OUTPUTS, "present"))
        )
        self._prefix, self._places = prefix_names(len(layers)), dict[int, Any]()

    @property
    def bytes(self) -> int:
        """How much memory they take."""
        return self.rows * sum(self._row_bytes(shape) for shape in self._shapes)

    def bind(self, binding: Any, first: int, end: int) -> None:
        """Let a graph read and write the rows from `first` up to `end`, in place."""
        for value, shape, past, present in zip(self._values, self._shapes, self._past, self._present, strict=True):
            at = value.data_ptr() + first * self._row_bytes(shape)
            place = (self.device, 0, self._element, (end - first, *shape), at)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def lend(self, binding: Any, names: Sequence[str]) -> None:
        """Let a graph read all of them, as inputs of those `names`."""
        for name, value, shape in zip(names, self._values, self._shapes, strict=True):
            binding.bind_input(name, self.device, 0, self._element, (self.rows, *shape), value.data_ptr())

    def place(self, graph: Graph, row: int, prefix: Sequence[Any]) -> None:
        """Copy the tensors of a prefix, which are on the device, to the beginning of `row`: no model is run.

        Args:
            graph: the same each time. That it writes to `row` is said once, since saying so takes longer than the copy.
        """
        if row not in self._places:
            self._places[row] = graph.session.io_binding()
            self.bind(self._places[row], row, row + 1)
        self._give(self._places[row], prefix)
        graph.run_bound(self._places[row])
        # What nobody has any more must not stay in memory for what is kept here.
        self._give(self._places[row], self._values)

    def on_device(self, prefix: ServedPrefix) -> list[Any]:
        """The tensors of `prefix` [1, kv_heads, length, head_dim] where the graphs run."""
        tensors = prefix.tensors if self._scales is None else self._scales.rounded(prefix.tensors)
        return [self._from(np.ascontiguousarray(each[None])) for each in tensors]

    def _give(self, binding: Any, tensors: Sequence[Any]) -> None:
        for name, tensor in zip(self._prefix, tensors, strict=True):
            binding.bind_ortvalue_input(name, tensor)

    def _value(self, shape: tuple[int, ...]) -> Any:
        # Zeros, so that nothing unknown is multiplied by a weight of zero.
        return self._from(np.zeros(shape, self.dtype))

    @property
    def _element(self) -> Any:
        # numpy's own bfloat16 is unknown to onnxruntime, which takes the number of the type in ONNX.
        return _BFLOAT16 if self.dtype.name == "bfloat16" else self.dtype

    def _from(self, array: Array) -> Any:
        if self.dtype.name != "bfloat16":
            return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, _BFLOAT16, self.device, 0)
        value.update_inplace(array.view(np.uint16))
        return value

    def _row_bytes(self, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape)) * self.dtype.itemsize
