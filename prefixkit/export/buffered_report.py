"""What `export.json` says of graphs that write into buffers."""

from __future__ import annotations

from typing import Any

from prefixkit.backbones.decoder import Decoder
from prefixkit.export.buffer_attention import OPSET
from prefixkit.export.decoder_report import decoder_parts
from prefixkit.export.report import GRAPH
from prefixkit.export.rounded_cache import FILE as SCALES
from prefixkit.serving.buffer_names import INPUTS, OUTPUTS

_ROUNDED = (
    f"int8, the prefix as well: whole numbers of what {SCALES} has for each channel, [kv_heads, 1, head_dim]; "
    "rounded to the nearest, and cut at -128 and 127"
)
DECODE, PLACE, SHARED = "onnx/decode.onnx", "onnx/place.onnx", "onnx/shared.onnx"


def buffered_parts(decoder: Decoder, rounded: bool = False) -> dict[str, Any]:
    """What is said of them alone.

    Args:
        rounded: whether keys and values are kept in eight bits.
    """
    parts = decoder_parts(decoder, baked=False)
    inputs = {key: name for key, name in INPUTS.items() if key != "position_ids" or key in parts["graph"]["inputs"]}
    return {
        "target": "cuda",
        "graph": {"file": GRAPH, "inputs": inputs, "outputs": dict(OUTPUTS), "opset": OPSET},
        "buffered": {"decode": DECODE, "place": PLACE, "shared": SHARED, **({"scales": SCALES} if rounded else {})},
        "model": parts["model"],
        "contract": {
            "buffers": "past and present are the same memory, [rows, kv_heads, capacity, head_dim]",
            "rows": "write_index: the slot of the first of input_ids; last: the place of the last real one; padding "
            "stands on the right, and what is written for it is written over by the next pass",
            **({"kv_cache": _ROUNDED} if rounded else {}),
            "positions": "position_ids count a row's real tokens from 0; behind a prefix, from its text_start",
            "prefix": "place.onnx writes [kv_heads, length, head_dim] a layer to slots 0, 1, …; write_index goes on",
            "decode": "decode.onnx takes one token a row, or any number of a single row",
            "shared": "shared.onnx takes any number of tokens, and beside the buffers one prefix for several rows, "
            "[1, kv_heads, length, head_dim] a layer; shared_length: how many of its slots stand before a row's own, 0 "
            "or all that are real; write_index does not count them",
        },
    }
