"""A portable graph of a decoder with its prefix as inputs of its own, which an adapter of ONNX Runtime can fill.

`prefixed` wraps what `prefixkit export --onnx` writes from the outside. Every layer N gets the inputs
`prefix.N.key|value` [1, kv_heads, prefix, head_dim], whose defaults are of length 0. Inside, they stand before the past
of every row, the mask has ones for them, position ids count on from them, and what is present leaves them out. So a
caller that keeps past, mask and positions speaks of its text only, and the same session serves no prefix, one, or
another. It costs a copy of the past a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from prefixkit.errors import FormatError
from prefixkit.prefix import Array
from prefixkit.serving.report import INPUTS, OUTPUTS

PREFIX = ("prefix.%d.key", "prefix.%d.value")
"""The inputs of a layer."""
_LENGTH = "prefix_length"


def prefixed(model: ir.Model) -> None:
    """Give `model` the inputs `PREFIX`, in place; its weights are not looked at.

    Raises:
        FormatError: the model is not a decoder's portable graph.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    pasts = list(_layers(inputs, INPUTS["past_key_names"], INPUTS["past_value_names"]))
    outputs = {value.name: value for value in graph.outputs}
    presents = list(_layers(outputs, OUTPUTS["present_key_names"], OUTPUTS["present_value_names"]))
    if not pasts or len(pasts) != len(presents) or INPUTS["attention_mask"] not in inputs:
        expected, found = "a graph with past_key_values.N.key|value and attention_mask", ", ".join(map(str, inputs))
        raise FormatError("graph", expected=expected, found=found[:120], next_step="write it with --onnx")
    names = [name % layer for layer in range(len(pasts) // 2) for name in PREFIX]
    prefixes = [_input(graph, name, past) for name, past in zip(names, pasts, strict=True)]
    before = _Before(graph)
    batch, length = before.sizes(inputs[INPUTS["input_ids"]], prefixes[0])
    for prefix, past in zip(prefixes, pasts, strict=True):
        rows = before.op("Expand", prefix, before.op("Concat", batch, before.constant([1, 1, 1]), axis=0))
        before.replace(past, before.op("Concat", rows, past, axis=2))
    ones = before.op("Expand", before.constant([1]), before.op("Concat", batch, length, axis=0))
    mask = inputs[INPUTS["attention_mask"]]
    before.replace(mask, before.op("Concat", ones, mask, axis=1))
    if (positions := inputs.get(INPUTS["position_ids"])) is not None:
        before.replace(positions, before.op("Add", positions, length))
    end, axis = before.constant([2**62]), before.constant([2])
    before.put()
    for present in presents:
        _cut(graph, present, [length, end, axis])


class _Before:
    """Nodes that are to run before all others."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The output of a new node."""
        node = ir.node(kind, inputs, attributes=attributes)
        node.outputs[0].name = f"prefixkit/{len(self.nodes)}/{kind}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, numbers: Sequence[int]) -> ir.Value:
        """`numbers` as a vector."""
        return self.op("Constant", value=ir.Tensor(np.array(numbers, dtype=np.int64)))

    def sizes(self, ids: ir.Value, prefix: ir.Value) -> tuple[ir.Value, ir.Value]:
        """How many rows there are, and slots of the prefix: a vector of one number each."""
        return self.op("Shape", ids, start=0, end=1), self.op("Shape", prefix, start=2, end=3)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every node that was there read `new` for `old`."""
        for node, index in old.uses():
            if node.graph is not None:
                node.replace_input_with(index, new)

    def put(self) -> None:
        """Insert the nodes at the beginning of the graph."""
        self.graph.insert_before(self.graph[0], self.nodes)


def _layers(values: dict[str | None, ir.Value], *patterns: str) -> Iterator[ir.Value]:
    """Those called after `patterns`, layer by layer."""
    layer = 0
    while all(pattern % layer in values for pattern in patterns):
        yield from (values[pattern % layer] for pattern in patterns)
        layer += 1


def _input(graph: ir.Graph, name: str, past: ir.Value) -> ir.Value:
    """An input that has a default of length 0, for keys or values like those of `past`."""
    assert past.shape is not None
    assert past.dtype is not None
    _, heads, _, dim = past.shape
    empty: Array = np.zeros((1, heads, 0, dim), dtype=past.dtype.numpy())
    value = ir.Value(
        name=name,
        shape=ir.Shape([1, heads, _LENGTH, dim]),
        type=ir.TensorType(past.dtype),
        const_value=ir.Tensor(empty, name=name),
    )
    graph.inputs.append(value)
    graph.initializers[name] = value
    return value


def _cut(graph: ir.Graph, present: ir.Value, where: Sequence[ir.Value]) -> None:
    """Leave the prefix out of an output."""
    whole, name = present, present.name
    node = ir.node("Slice", [whole, *where])
    cut = node.outputs[0]
    cut.name, cut.shape, cut.type = name, present.shape, present.type
    whole.name, whole.shape = f"{name}/with_prefix", None
    graph.outputs[list(graph.outputs).index(present)] = cut
    graph.append(node)
