"""`config.pbtxt`: what Triton's ONNX Runtime backend is told of a graph, in protobuf's text form.

Schema: `ModelConfig` in model_config.proto of github.com/triton-inference-server/common.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from prefixkit.errors import ConfigError

TYPES: Mapping[ir.DataType, str] = {
    ir.DataType.BOOL: "TYPE_BOOL",
    ir.DataType.INT8: "TYPE_INT8",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.FLOAT: "TYPE_FP32",
}
"""Types that the backend takes. Triton has TYPE_BF16 too; this backend refuses it (issue 8464 of its server)."""


def config_of(name: str, graph: ir.Graph, parameters: Mapping[str, str]) -> str:
    """The configuration of the model `name`.

    Its first dimension is that of the graph, like the others: Triton is to put no requests together, since rows of
    buffers belong to whoever keeps them. -1 is a dimension that a request may choose.

    Raises:
        ConfigError: an input or output of a type that the backend does not take.
    """
    lines = [
        f"name: {_text(name)}",
        'backend: "onnxruntime"',
        "max_batch_size: 0",
        *_tensors("input", graph.inputs),
        *_tensors("output", graph.outputs),
        "instance_group { count: 1 kind: KIND_AUTO }",
        *(f"parameters {{ key: {_text(k)} value {{ string_value: {_text(v)} }} }}" for k, v in parameters.items()),
    ]
    return "\n".join(lines) + "\n"


def _tensors(field: str, values: Sequence[ir.Value]) -> Iterator[str]:
    for value in values:
        assert value.name is not None
        assert value.shape is not None
        if value.dtype not in TYPES:
            found, step = str(value.dtype), "export with --dtype float16 or float32"
            expected = "types that Triton's ONNX Runtime backend takes"
            raise ConfigError(f"{field} {value.name}", expected=expected, found=found, next_step=step)
        # Triton has no scalars: where rows are the graph's own, one number is [1] to it.
        dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in value.shape) or "1"
        yield f"{field} {{ name: {_text(value.name)} data_type: {TYPES[value.dtype]} dims: [ {dims} ] }}"


def _text(value: str) -> str:
    # Without control characters, JSON's strings are protobuf's; beyond ASCII both are UTF-8.
    return json.dumps("".join(one for one in value if one.isprintable()), ensure_ascii=False)
