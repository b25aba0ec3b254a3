"""From a decoder to an ONNX graph with stable names, named dimensions and nothing of this machine in it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit import __version__
from prefixkit.export.wrapper import FlatDecoder
from prefixkit.format.manifest import LayerGeometry
from prefixkit.injections import KeyValuePrefix
from prefixkit.serving.report import INPUTS, OUTPUTS

OPSET = 20
"""Old enough for onnxruntime-web and other runtimes; the first with Gelu."""
_BATCH, _SEQ, _PAST, _TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def trace(
    model: PreTrainedModel,
    geometry: Sequence[LayerGeometry],
    baked: KeyValuePrefix | None = None,
) -> ir.Model:
    """The graph of a pristine `transformers` decoder; see `prefixkit.export.wrapper.FlatDecoder`.

    Weights are as the checkpoint stores them, with a Transpose node where the graph needs them otherwise; onnxruntime
    folds those when it loads the graph. `baked` is a prefix that becomes part of the graph.
    """
    with traceable(model):
        graph = graph_of(
            FlatDecoder(model, geometry, baked),
            _example(model, geometry),
            _dynamic(len(geometry)),
            inputs=_names(INPUTS, len(geometry)),
            outputs=_names(OUTPUTS, len(geometry)),
            shape=_shape,
        )
    for unused in [value for value in graph.graph.inputs if not value.uses() and value.name == INPUTS["position_ids"]]:
        graph.graph.inputs.remove(unused)
    return graph


def graph_of(
    module: nn.Module,
    example: tuple[Any, ...],
    dynamic: Any,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    shape: Callable[[ir.Value], ir.Shape],
    opset: int = OPSET,
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    fuse: Callable[[ir.Model], None] = lambda _: None,
) -> ir.Model:
    """What `module` does with its arguments, as a graph.

    Args:
        example: arguments, of sizes that differ from each other and from 0 and 1, which are taken for constants.
        dynamic: by argument, which of their dimensions may have other sizes.
        inputs, outputs: names, in the order of the arguments and of what `module` returns.
        shape: how an input's or output's dimensions are to be called.
        translations: what operators of ours become in ONNX.
        fuse: changes the graph while the shapes of all values are known.
    """
    with _quiet():
        program: Any = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            custom_translation_table=dict(translations or {}),
        )
        graph: ir.Model = program.model
        optimize_ir(graph, onnx_shape_inference=False, should_fold=_not_transposes)
        fuse(graph)
    _tidy(graph, shape)
    return graph


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Plain attention, and experts without data-dependent control flow, for the length of a `with` block."""
    attention = model.config._attn_implementation
    experts = getattr(model.config, "_experts_implementation", None)
    # Falcon chooses inside its one attention class, by this very attribute.
    model.config._attn_implementation = "eager"
    if experts is not None:
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        if experts is not None:
            model.set_experts_implementation(experts)


@contextmanager
def _quiet() -> Iterator[None]:
    # The exporter warns of its own internals and of packages that are not installed.
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _example(model: PreTrainedModel, geometry: Sequence[LayerGeometry]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    # Sizes that differ from each other and from 0 and 1, which the tracer would take for constants.
    batch, seq, past = 2, 3, 4
    shapes = [(layer.kv_heads, dim) for layer in geometry for dim in (layer.key_dim, layer.value_dim)]
    tokens = torch.ones(batch, past + seq, dtype=torch.long, device=model.device)
    positions = torch.arange(past, past + seq, device=model.device).repeat(batch, 1)
    cache = [torch.zeros(batch, heads, past, dim, dtype=model.dtype, device=model.device) for heads, dim in shapes]
    return tokens[:, :seq].clone(), tokens, positions, cache


def _dynamic(layers: int) -> Any:
    batch, seq, past = torch.export.Dim(_BATCH), torch.export.Dim(_SEQ), torch.export.Dim(_PAST)
    # A sum of two dimensions cannot be named; the tracer finds it.
    mask = {0: batch, 1: torch.export.Dim.DYNAMIC}
    return {0: batch, 1: seq}, mask, {0: batch, 1: seq}, [{0: batch, 2: past}] * (2 * layers)


def _names(patterns: dict[str, str], layers: int) -> list[str]:
    """Every input or output name: those without a layer first, then key and value of each layer."""
    plain = [name for name in patterns.values() if "%d" not in name]
    return plain + [name % layer for layer in range(layers) for name in patterns.values() if "%d" in name]


def _not_transposes(node: ir.Node) -> bool | None:
    return False if node.op_type == "Transpose" else None


def _tidy(graph: ir.Model, shape: Callable[[ir.Value], ir.Shape]) -> None:
    ClearMetadataAndDocStringPass()(graph)
    graph.producer_name, graph.producer_version = "prefixkit", __version__
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        value.shape = shape(value)
    for node in ir.traversal.RecursiveGraphIterator(graph.graph):
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    for name, initializer in list(graph.graph.initializers.items()):
        initializer.name = name.removeprefix("model.")
        initializer.metadata_props.clear()


def _shape(value: ir.Value) -> ir.Shape:
    assert value.name is not None
    assert value.shape is not None
    if value.name in (INPUTS["input_ids"], INPUTS["position_ids"]):
        return ir.Shape([_BATCH, _SEQ])
    if value.name == INPUTS["attention_mask"]:
        return ir.Shape([_BATCH, _TOTAL])
    if value.name == OUTPUTS["logits"]:
        return ir.Shape([_BATCH, _SEQ, value.shape[-1]])
    length = _PAST if value.name.startswith("past") else _TOTAL
    return ir.Shape([_BATCH, value.shape[1], length, value.shape[3]])
