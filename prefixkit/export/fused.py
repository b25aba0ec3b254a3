"""Nodes that a finished graph can do without: sums that norms can make, views that turn nothing, products in pieces.

Each is a kernel to launch on a GPU, and on a CPU a pass over little memory that no second thread shares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_NORMS = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


def fuse(graph: ir.Model) -> None:
    """Let norms add (onnxruntime's SkipLayerNormalization), and leave views out that only undo each other.

    The shapes of values must be as the tracer knew them.
    """
    graph.opset_imports["com.microsoft"] = 1
    for node in list(graph.graph):
        if node.op_type in _NORMS:
            _add_inside(graph, node)
        elif node.op_type in _SOURCES and not node.outputs[0].is_graph_output():
            _skip(node)
    RemoveUnusedNodesPass()(graph)


def pack(graph: ir.Model) -> None:
    """Multiply by the weights of query, key and value at once, where GroupQueryAttention takes what comes of it.

    The weights stay where they are stored: onnxruntime puts them together when it loads the graph.
    """
    for attention in [node for node in graph.graph if node.op_type == "GroupQueryAttention"]:
        products = [product for value in attention.inputs[:3] if (product := _product(value)) is not None]
        if len(products) < 3 or any(not product.goes_with(products[0]) for product in products):
            continue
        for place, value in enumerate((_together(graph, products), None, None)):
            attention.replace_input_with(place, value)
        for node in (node for product in products for node in product.nodes):
            if not node.outputs[0].uses():
                graph.graph.remove(node, safe=True)


class _Product(NamedTuple):
    """States times the turned weight of a linear layer, and its bias; `nodes` from the last to the first."""

    nodes: list[ir.Node]
    states: ir.Value | None
    weight: ir.Value | None
    bias: ir.Value | None

    def goes_with(self, other: _Product) -> bool:
        return self.states is other.states and (self.bias is None) == (other.bias is None)


def _product(value: ir.Value | None) -> _Product | None:
    node, bias = None if value is None else value.producer(), None
    nodes = [] if node is None else [node]
    if node is not None and node.op_type == "Add" and _is_weight(node.inputs[1], 1):
        first, bias = node.inputs
        nodes += [] if first is None or first.producer() is None else [first.producer()]
    if not nodes or nodes[-1].op_type != "FusedMatMul" or not _is_weight(nodes[-1].inputs[1], 2):
        return None
    states, weight = nodes[-1].inputs
    return _Product(nodes, states, weight, bias)


def _is_weight(value: ir.Value | None, dimensions: int) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == dimensions


def _together(graph: ir.Model, products: list[_Product]) -> ir.Value:
    weight = ir.node("Concat", [product.weight for product in products], {"axis": 0})
    inputs = [products[0].states, weight.outputs[0]]
    made = [weight, ir.node("FusedMatMul", inputs, {"transB": 1}, domain="com.microsoft")]
    if products[0].bias is not None:
        bias = ir.node("Concat", [product.bias for product in products], {"axis": 0})
        made += [bias, ir.node("Add", [made[-1].outputs[0], bias.outputs[0]])]
    graph.graph.insert_before(products[0].nodes[-1], made)
    return made[-1].outputs[0]


def _add_inside(graph: ir.Model, norm: ir.Node) -> None:
    """Let `norm` add, where it norms the last dimension of a sum of two tensors of the same shape."""
    total, *weights = norm.inputs
    added = None if total is None else total.producer()
    if added is None or added.op_type != "Add" or not _same(*added.inputs) or not _over_last(norm):
        return
    assert total is not None
    if any(weight is None or weight.const_value is None or weight.dtype != total.dtype for weight in weights):
        return
    normed, kept = norm.outputs[0], ir.Value(type=total.type, shape=total.shape)
    attributes = {"epsilon": norm.attributes["epsilon"].as_float()}
    outputs = [ir.Value(type=normed.type, shape=normed.shape), ir.Value(name=""), ir.Value(name=""), kept]
    # Where the sum was made, which others may read before it is normed.
    made = ir.node(_NORMS[norm.op_type], [*added.inputs, *weights], attributes, domain="com.microsoft", outputs=outputs)
    graph.graph.insert_before(added, made)
    for before, after in ((normed, outputs[0]), (total, kept)):
        ir.convenience.replace_all_uses_with(before, after)
    graph.graph.remove([norm, added], safe=True)


def _over_last(norm: ir.Node) -> bool:
    (axis, shape), others = (norm.attributes["axis"].as_int(), norm.outputs[0].shape), norm.outputs[1:]
    return shape is not None and len(shape) == 3 and axis in (-1, 2) and not any(other.uses() for other in others)


def _skip(view: ir.Node) -> None:
    """Let those who read `view` read what it is a view of, or let it look through the view before it."""
    source = _SOURCES[view.op_type](view)
    if source is not None:
        ir.convenience.replace_all_uses_with(view.outputs[0], source)


def _before_transpose(view: ir.Node) -> ir.Value | None:
    before = None if view.inputs[0] is None else view.inputs[0].producer()
    if before is None or before.op_type != "Transpose":
        return None
    first, second = (node.attributes["perm"].as_ints() for node in (before, view))
    return before.inputs[0] if [first[at] for at in second] == list(range(len(first))) else None


def _before_reshape(view: ir.Node) -> ir.Value | None:
    before = None if view.inputs[0] is None else view.inputs[0].producer()
    # Else a zero stands for a size of what is looked at.
    if before is not None and before.op_type == "Reshape" and view.attributes["allowzero"].as_int() == 1:
        view.replace_input_with(0, before.inputs[0])
    return view.inputs[0] if _same(view.inputs[0], view.outputs[0]) else None


_SOURCES: dict[str, Callable[[ir.Node], ir.Value | None]] = {
    "Transpose": _before_transpose,
    "Reshape": _before_reshape,
}


def _same(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether both are known to have the same shape."""
    if one is None or other is None or one.shape is None or other.shape is None:
        return False
    known = all(isinstance(size, int) or size.value is not None for size in one.shape)
    return known and one.shape == other.shape
