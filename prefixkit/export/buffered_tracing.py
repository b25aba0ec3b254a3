"""The graphs of `--target cuda`, over the same weights and the same buffers: prompts, tokens, and prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.export.buffer_attention import OPSET, TRANSLATIONS, tensor_scatter
from prefixkit.export.buffer_writing import Form
from prefixkit.export.buffered_wrapper import BufferedDecoder
from prefixkit.export.emitted import TRANSLATIONS as WHOLE
from prefixkit.export.fused import fuse
from prefixkit.export.tracing import graph_of
from prefixkit.format.manifest import LayerGeometry
from prefixkit.serving.buffer_names import (
    GIVEN_PREFIX,
    INPUTS,
    OUTPUTS,
    SHARED_LENGTH,
    SHARED_PREFIX,
    prefix_names,
    shared_names,
)
from prefixkit.serving.cache_scales import CacheScales
from prefixkit.serving.graph import per_layer

_ROWS, _SEQ, _CAPACITY, _PREFIX = "rows", "sequence_length", "capacity", "prefix_length"
_SIZES = {_ROWS: 2, _SEQ: 3, _CAPACITY: 16, _PREFIX: 5}
"""Sizes in the example: all different, and none of them 0 or 1, which are taken for constants."""
_DIMS = {size: torch.export.Dim(size) for size in _SIZES}
_BUFFERS = (_ROWS, None, _CAPACITY, None)
_OTHERS = {GIVEN_PREFIX: (_ROWS, None, _PREFIX, None), SHARED_PREFIX: (None, None, _PREFIX, None)}
_DIMENSIONS: Mapping[str, tuple[str | None, ...]] = {
    INPUTS["input_ids"]: (_ROWS, _SEQ),
    INPUTS["position_ids"]: (_ROWS, _SEQ),
    INPUTS["write_index"]: (_ROWS,),
    INPUTS["last"]: (_ROWS,),
    SHARED_LENGTH: (_ROWS,),
    OUTPUTS["logits"]: (_ROWS, None),
    OUTPUTS["token"]: (_ROWS,),
}


def trace_buffered(
    model: PreTrainedModel, geometry: Sequence[LayerGeometry], form: Form, scales: CacheScales | None = None
) -> ir.Model:
    """The graph of a decoder that writes into buffers; see `prefixkit.export.buffered_wrapper`.

    Args:
        form: `scattered` takes any number of tokens a row, `grouped` takes one, or any number in a single row;
            `shared` takes any number, and a prefix for all rows that are to see it.
        scales: of keys and values in buffers of eight bits; None where these have the dtype of the model.
    """
    layers, dtype = len(geometry), _dtype(model, scales)
    names = [name for name in INPUTS.values() if "%d" not in name]
    past, present = (list(per_layer(each, which, layers)) for each, which in ((INPUTS, "past"), (OUTPUTS, "present")))
    example: list[Any] = [*(_numbers(name, model) for name in names), _buffers(geometry, model, _CAPACITY, dtype)]
    dynamic: list[Any] = [*(_dynamic(name) for name in names), [_dynamic("")] * len(past)]
    inputs = [*names, *past]
    if form == "shared":
        example += [_numbers(SHARED_LENGTH, model), [one[:1] for one in _buffers(geometry, model, _PREFIX, dtype)]]
        dynamic += [_dynamic(SHARED_LENGTH), [_dynamic(SHARED_PREFIX)] * len(past)]
        inputs += [SHARED_LENGTH, *shared_names(layers)]
    graph = graph_of(
        BufferedDecoder(model, form, scales),
        tuple(example),
        tuple(dynamic),
        inputs=inputs,
        outputs=[OUTPUTS["logits"], OUTPUTS["token"], *present],
        shape=_shape,
        opset=OPSET,
        translations={**TRANSLATIONS, **WHOLE},
        fuse=fuse,
    )
    for unused in [value for value in graph.graph.inputs if not value.uses()]:
        graph.graph.inputs.remove(unused)
    _fuse_transposes(graph)
    return graph


def trace_place(
    model: PreTrainedModel, geometry: Sequence[LayerGeometry], scales: CacheScales | None = None
) -> ir.Model:
    """The graph that writes one prefix to the beginning of rows: no weights, and one operator a tensor."""
    layers, dtype = len(geometry), _dtype(model, scales)
    past, present = (list(per_layer(each, which, layers)) for each, which in ((INPUTS, "past"), (OUTPUTS, "present")))
    return graph_of(
        _Place(),
        (_buffers(geometry, model, _CAPACITY, dtype), _buffers(geometry, model, _PREFIX, dtype)),
        ([_dynamic("")] * len(past), [_dynamic(GIVEN_PREFIX)] * len(past)),
        inputs=[*past, *prefix_names(layers)],
        outputs=present,
        shape=_shape,
        opset=OPSET,
        translations=TRANSLATIONS,
    )


def _fuse_transposes(graph: ir.Model) -> None:
    """Multiply by weights as the checkpoint stores them: nothing is turned around in memory when a graph is loaded."""
    for node in [node for node in graph.graph if node.op_type == "MatMul"]:
        left, right = node.inputs
        turned = right.producer() if right is not None else None
        if left is None or turned is None or turned.op_type != "Transpose" or turned.inputs[0].const_value is None:
            continue
        by = turned.inputs[0]
        fused = ir.node("FusedMatMul", [left, by], {"transB": 1}, domain="com.microsoft", outputs=[ir.Value()])
        graph.graph.insert_before(node, fused)
        ir.convenience.replace_all_uses_with(node.outputs[0], fused.outputs[0])
        fused.outputs[0].name = node.outputs[0].name
        graph.graph.remove(node, safe=True)
        if not turned.outputs[0].uses():
            graph.graph.remove(turned, safe=True)


class _Place(nn.Module):
    def forward(self, buffers: list[Tensor], prefix: list[Tensor]) -> tuple[Tensor, ...]:
        index = torch.zeros_like(buffers[0][:, 0, 0, 0], dtype=torch.long)
        return tuple(tensor_scatter(buffer, new, index) for buffer, new in zip(buffers, prefix, strict=True))


def _numbers(name: str, model: PreTrainedModel) -> Tensor:
    sizes = [_SIZES[size] for size in _DIMENSIONS[name] if size is not None]
    return torch.zeros(sizes, dtype=torch.long, device=model.device)


def _dtype(model: PreTrainedModel, scales: CacheScales | None) -> torch.dtype:
    return model.dtype if scales is None else torch.int8


def _buffers(
    geometry: Sequence[LayerGeometry], model: PreTrainedModel, length: str, dtype: torch.dtype
) -> list[Tensor]:
    shapes = [(layer.kv_heads, dim) for layer in geometry for dim in (layer.key_dim, layer.value_dim)]
    like: dict[str, Any] = {"dtype": dtype, "device": model.device}
    return [torch.zeros(_SIZES[_ROWS], heads, _SIZES[length], dim, **like) for heads, dim in shapes]


def _named(name: str) -> tuple[str | None, ...]:
    """What the dimensions of an input or output are called; None for those that are fixed."""
    other = next((sizes for start, sizes in _OTHERS.items() if name.startswith(start)), _BUFFERS)
    return _DIMENSIONS.get(name, other)


def _dynamic(name: str) -> dict[int, Any]:
    return {at: _DIMS[size] for at, size in enumerate(_named(name)) if size is not None}


def _shape(value: ir.Value) -> ir.Shape:
    assert value.name is not None
    assert value.shape is not None
    return ir.Shape([name or size for name, size in zip(_named(value.name), value.shape, strict=True)])
