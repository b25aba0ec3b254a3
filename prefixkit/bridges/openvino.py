"""Prefixes in OpenVINO: as the past of a stateless model, or as the states of a stateful one.

    request = openvino.Core().compile_model("FOLDER/openvino_model.xml", "CPU", EXACT).create_infer_request()
    begun = start(request, [prefix, other, None])

begins three texts with a prefix each, or none, in a model that `prefixkit export --openvino` wrote. The graph of
`prefixkit export --onnx` takes what `past` gives as its inputs. Measured with OpenVINO 2026.4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from prefixkit.bridges.decoder_prefix import keys_and_values
from prefixkit.errors import FormatError, MismatchError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.prefix import Array, Prefix
from prefixkit.serving.prefix_table import real_slots, served, stacked
from prefixkit.serving.report import INPUTS, OUTPUTS

TITLE = "OpenVINO"
EXACT: Mapping[str, str] = MappingProxyType({"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"})
"""How a model is to be compiled: left to itself, OpenVINO computes in bfloat16 and keeps keys and values in 8 bits
wherever the processor is faster at that."""
_PRESENT = OUTPUTS["present_key_names"].partition("%")[0]


@dataclass(frozen=True, eq=False)
class Past:
    """What rows have before their text.

    Attributes:
        tensors: by the name of the input, [rows, kv_heads, longest prefix, head_dim] in float32, shorter prefixes
            padded on the left.
        mask: [rows, longest prefix], 1 for a slot of a prefix: what `attention_mask` begins with.
        positions: [rows], the position of each row's first token.
    """

    tensors: Mapping[str, Array]
    mask: Array
    positions: Array


def past(model: Any, prefixes: Sequence[Prefix | None]) -> Past:
    """The past of a batch with one row for each prefix, for a compiled `model` that takes it as inputs.

    Raises:
        FormatError: something besides keys and values right before the text, or a model that is no exported decoder.
        MismatchError: the model has other layers or shapes than a prefix. Weights are not compared.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for port in model.inputs:
        names = [name for name in port.get_names() if name.startswith("past_")]
        shapes |= {name: (port.partial_shape[1].get_length(), port.partial_shape[3].get_length()) for name in names}
    return _past(shapes, prefixes)


def start(request: Any, prefixes: Sequence[Prefix | None]) -> Past:
    """Begin texts, one for each prefix: put the prefixes into the states of `request`. Raises as `past` does.

    Call it for every new text, also for None alone: a state without rows cannot grow.
    """
    import openvino

    request.reset_state()
    states = {state.name.partition(_PRESENT)[0]: state for state in request.query_state()}
    shapes = {name: (state.state.shape[1], state.state.shape[3]) for name, state in states.items()}
    begun = _past(shapes, prefixes)
    for name, tensor in begun.tensors.items():
        states[name].state = openvino.Tensor(tensor)
    return begun


def stateful(model: Any) -> None:
    """Turn past and present of an `openvino.Model` into states, in place."""
    from openvino.passes import MakeStateful, Manager

    pairs: dict[str, str] = {}
    for role in ("key", "value"):
        given, made = INPUTS[f"past_{role}_names"], OUTPUTS[f"present_{role}_names"]
        pairs |= {given % layer: made % layer for layer in range(len(model.inputs)) if _has(model, given % layer)}
    passes = Manager()
    passes.register_pass(MakeStateful(pairs))
    passes.run_passes(model)


def _has(model: Any, name: str) -> bool:
    return any(name in port.get_names() for port in model.inputs)


def _past(shapes: Mapping[str, tuple[int, int]], prefixes: Sequence[Prefix | None]) -> Past:
    """What `past` gives; `shapes` are kv_heads and head_dim by input."""
    if not shapes or not prefixes:
        found = "a model without a past" if prefixes else "no row"
        step = "`prefixkit export --openvino` writes one, `--onnx` without states" if prefixes else "give [None]"
        raise FormatError("openvino", expected="a decoder and prefixes for its rows", found=found, next_step=step)
    names = [INPUTS[f"past_{role}_names"] % layer for layer in range(len(shapes) // 2) for role in ("key", "value")]
    layers = tuple(
        LayerGeometry(kv_heads=shapes[key][0], key_dim=shapes[key][1], value_dim=shapes[value][1])
        for key, value in zip(names[0::2], names[1::2], strict=True)
    )
    for prefix in prefixes:
        if prefix is not None:
            _refuse_other_shapes(prefix, layers)
    rows = [None if prefix is None else served(prefix, np.dtype(np.float32)) for prefix in prefixes]
    tensors = dict(zip(names, stacked(rows, layers, np.dtype(np.float32)), strict=True))
    return Past(tensors, real_slots(rows), np.array([0 if row is None else row.text_start for row in rows]))


def _refuse_other_shapes(prefix: Prefix, layers: Sequence[LayerGeometry]) -> None:
    found = [(key.shape[0], key.shape[2], value.shape[2]) for key, value in keys_and_values(prefix, TITLE)]
    expected = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in layers]
    if found != expected:
        told = (f"{len(shapes)} layers of (kv_heads, key_dim, value_dim) {shapes[0]}" for shapes in (expected, found))
        expects, finds = told
        step = "take the model that the prefix was made for"
        raise MismatchError("openvino", expected=expects, found=finds, next_step=step)
