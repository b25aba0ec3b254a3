"""From a model that reads to an ONNX graph: an encoder of text or of images, or any of the decoders with a head."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import Dim

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.geometry import one_input
from prefixkit.export.encoder_wrapper import flat_reader
from prefixkit.export.pair_attention import traceable as with_given
from prefixkit.export.reader_plan import ReadingBackbone
from prefixkit.export.tracing import graph_of, traceable
from prefixkit.serving.reader_names import (
    BATCH,
    BEFORE,
    DIMENSIONS,
    FREE,
    LABELS,
    LOGITS,
    PLACED,
    PLACES,
    PREFIX,
    PROMPT,
    SEEN,
    SEQ,
    STATES,
    past_names,
)
from prefixkit.serving.report import ReaderParts

_SIZES = {BATCH: 2, SEQ: 7, PREFIX: 4, PROMPT: 3, PLACES: 5, LABELS: 9}
"""Sizes in the example: all different, and none of them 0 or 1, which are taken for constants."""


def trace_reader(backbone: ReadingBackbone, plan: ReaderParts) -> ir.Model:
    """The graph; see `prefixkit.export.reader_wrapper.FlatReader`."""
    example = {**_example(backbone, plan), **_past(backbone)}
    with _plain_attention(backbone):
        return graph_of(
            flat_reader(backbone, plan),
            (list(example.values()),),
            ([_dynamic(name) for name in example],),
            inputs=list(example),
            outputs=[STATES, *([LOGITS] if plan.logits else [])],
            shape=lambda value: _shape(value, plan),
        )


def _plain_attention(backbone: ReadingBackbone) -> AbstractContextManager[None]:
    model = backbone.release()
    return traceable(model) if isinstance(backbone, Decoder) else with_given(model)


def _example(backbone: ReadingBackbone, plan: ReaderParts) -> dict[str, Tensor]:
    sizes = dict(_SIZES)
    sizes[PLACED] = sizes[SEQ] + (sizes[PROMPT] if plan.inserts else 0)
    sizes[SEEN] = sizes[PREFIX] + sizes[PLACED]
    sizes[BEFORE] = sizes[PREFIX] + (sizes[PROMPT] if plan.inserts else 0)
    sizes |= {"hidden": backbone.hidden_size, "layers": backbone.layers}
    if backbone.kind == "vision":
        shape = one_input(backbone.release())["pixel_values"].shape
        sizes |= dict(zip(("channels", "height", "width"), shape[1:], strict=True))
    return {name: _tensor(name, sizes, backbone) for name in plan.inputs}


def _tensor(name: str, sizes: dict[str, int], backbone: ReadingBackbone) -> Tensor:
    shape = [sizes[dimension] for dimension in DIMENSIONS[name]]
    numbers = name.endswith(("_ids", "_mask"))
    dtype = torch.long if numbers else backbone.model.dtype
    return torch.ones(shape, dtype=dtype, device=backbone.device)


def _past(backbone: ReadingBackbone) -> dict[str, Tensor]:
    shapes = [(layer.kv_heads, dim) for layer in backbone.geometry for dim in (layer.key_dim, layer.value_dim)]
    like = {"dtype": backbone.model.dtype, "device": backbone.device}
    return {
        name: torch.zeros(_SIZES[BATCH], heads, _SIZES[PREFIX], dim, **like)
        for name, (heads, dim) in zip(past_names(backbone.geometry), shapes, strict=True)
    }


def _dynamic(name: str) -> dict[int, Any]:
    """Which dimensions of an input may have any size; the tracer finds out which lengths are sums of others."""
    if name not in DIMENSIONS:
        return {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    return {index: Dim.DYNAMIC for index, dimension in enumerate(DIMENSIONS[name]) if dimension in FREE}


def _shape(value: ir.Value, plan: ReaderParts) -> ir.Shape:
    """`value`'s shape, with the names of the dimensions that may have any size."""
    assert value.name is not None
    assert value.shape is not None
    named = _output(value.name, plan) or DIMENSIONS.get(value.name) or (BATCH, "heads", PREFIX, "head_dim")
    sizes = zip(named, value.shape, strict=True)
    return ir.Shape([size if isinstance(size, int) else _called(name, plan) for name, size in sizes])


def _called(dimension: str, plan: ReaderParts) -> str:
    return SEQ if dimension == PLACED and not plan.inserts else dimension


def _output(name: str, plan: ReaderParts) -> tuple[str, ...] | None:
    if name == STATES:
        return (BATCH, SEQ, "hidden")
    if name != LOGITS:
        return None
    if plan.head is None:
        return (BATCH, SEQ, "vocabulary")
    return (BATCH, SEQ, LABELS) if plan.head == "each" else (BATCH, LABELS)
