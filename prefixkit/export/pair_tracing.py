"""From an encoder-decoder to two ONNX graphs with the names and dimensions of optimum, and inputs for prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel

from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.export.pair_attention import traceable
from prefixkit.export.pair_wrapper import FlatEncoder, FlatPairDecoder
from prefixkit.export.tracing import graph_of
from prefixkit.format.manifest import LayerGeometry
from prefixkit.serving.graph import per_layer
from prefixkit.serving.pair_names import DECODER_INPUTS, DECODER_OUTPUTS, ENCODER_INPUTS, ENCODER_OUTPUTS

_SIZES = {
    "batch_size": 2,
    "sequence_length": 3,
    "past_sequence_length": 4,
    "total_sequence_length": 7,
    "encoder_sequence_length": 5,
    "encoder_prefix_length": 6,
    "encoder_total_length": 11,
    "cross_length": 8,
}
"""The dimensions, and their sizes in the example: all of them different, and none of them 0 or 1."""
_ENCODER = {
    "input_ids": "encoder_sequence_length",
    "attention_mask": "encoder_total_length",
    "prefix_key_values": "encoder_prefix_length",
    "last_hidden_state": "encoder_sequence_length",
    "present": "encoder_sequence_length",
}
"""The length of every input and output of the encoder, by the start of its name."""
_DECODER = {
    "input_ids": "sequence_length",
    "attention_mask": "total_sequence_length",
    "encoder_attention_mask": "cross_length",
    "past_key_values": "past_sequence_length",
    "cross_past_key_values": "cross_length",
    "logits": "sequence_length",
    "present": "total_sequence_length",
}
"""The same of the decoder, where what was read goes by `cross_past_key_values`."""


def trace_encoder(backbone: EncoderDecoder) -> ir.Model:
    """The encoder's graph; see `prefixkit.export.pair_wrapper.FlatEncoder`."""
    model, stacks = backbone.release(), backbone.identity.stacks
    prefix = _caches(stacks["encoder"], _ENCODER["prefix_key_values"], model)
    with traceable(model):
        return graph_of(
            FlatEncoder(model),
            (_ones(_ENCODER["input_ids"], model), _ones(_ENCODER["attention_mask"], model), prefix),
            (_ROWS, _ROWS, [_CACHE] * len(prefix)),
            inputs=_names(ENCODER_INPUTS, {"prefix": stacks["encoder"]}),
            outputs=_names(ENCODER_OUTPUTS, {"cross_present": stacks["decoder"]}),
            shape=lambda value: _shape(value, _ENCODER[_start(value)]),
        )


def trace_pair_decoder(backbone: EncoderDecoder) -> ir.Model:
    """The decoder's graph; see `prefixkit.export.pair_wrapper.FlatPairDecoder`."""
    model, layers = backbone.release(), backbone.identity.stacks["decoder"]
    past, cross = (_caches(layers, _DECODER[name], model) for name in ("past_key_values", "cross_past_key_values"))
    masks = (_ones(_DECODER[name], model) for name in ("attention_mask", "encoder_attention_mask"))
    prefix_length = torch.tensor(2, device=model.device)
    with traceable(model):
        return graph_of(
            FlatPairDecoder(model),
            (_ones(_DECODER["input_ids"], model), *masks, prefix_length, past, cross),
            (_ROWS, _ROWS, _ROWS, {}, [_CACHE] * len(past), [_CACHE] * len(cross)),
            inputs=_names(DECODER_INPUTS, {"past": layers, "cross_past": layers}),
            outputs=_names(DECODER_OUTPUTS, {"present": layers}),
            shape=_decoder_shape,
        )


# The tracer finds out which lengths are sums of others; names are given afterwards.
_ROWS: Any = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
_CACHE: Any = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}


def _ones(length: str, model: PreTrainedModel) -> Tensor:
    return torch.ones(_SIZES["batch_size"], _SIZES[length], dtype=torch.long, device=model.device)


def _caches(layers: Sequence[LayerGeometry], length: str, model: PreTrainedModel) -> list[Tensor]:
    shapes = [(layer.kv_heads, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
    return [
        torch.zeros(_SIZES["batch_size"], heads, _SIZES[length], dim, dtype=model.dtype, device=model.device)
        for heads, dim in shapes
    ]


def _names(patterns: Mapping[str, str], lists: Mapping[str, Sequence[LayerGeometry]]) -> list[str]:
    """Those without a layer first, then key and value of each layer of each of `lists`."""
    plain = [name for name in patterns.values() if "%d" not in name]
    return plain + [name for which, layers in lists.items() for name in per_layer(patterns, which, len(layers))]


def _start(value: ir.Value) -> str:
    return str(value.name).partition(".")[0]


def _decoder_shape(value: ir.Value) -> ir.Shape:
    start = _start(value)
    if start == DECODER_INPUTS["prefix_length"]:
        return ir.Shape([])
    return _shape(value, _DECODER["cross_" * (".encoder." in str(value.name)) + start])


def _shape(value: ir.Value, length: str) -> ir.Shape:
    """`value`'s shape, with the names of its dimensions: rows first, and `length` third where there are heads."""
    assert value.shape is not None
    dims: list[Any] = ["batch_size", *list(value.shape)[1:]]
    dims[2 if len(dims) == 4 else 1] = length
    return ir.Shape(dims)
