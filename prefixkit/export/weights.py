"""Where a graph's weights are stored: beside it, in it, or in the checkpoint's own safetensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx_ir as ir

from prefixkit.errors import ConfigError
from prefixkit.format.digest import weight_files
from prefixkit.format.header import Header, TensorEntry, read_header

Weights = Literal["external", "checkpoint", "inline"]
WEIGHTS: tuple[Weights, ...] = ("external", "checkpoint", "inline")

_SMALL = 256
"""Bytes below which a tensor stays in the graph's own file: scalars, shapes, biases of nothing."""
_CHUNK = 2**20
_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "U8": ir.DataType.UINT8}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: Path
    header: Header
    entry: TensorEntry

    @property
    def offset(self) -> int:
        return self.header.data_start + self.entry.begin


def save_graph(graph: ir.Model, path: Path, weights: Weights, checkpoint: Path) -> None:
    """Write `graph` to `path`, with its weights where `weights` says.

    `external`: in `NAME.onnx.data`, each once and transposed as the graph multiplies them. `inline`: in the graph's
    file, which protobuf limits to 2 GiB. `checkpoint`: in the safetensors files of the folder `checkpoint`, which are
    linked or copied beside the graph, because onnxruntime refuses to follow links out of its folder; whatever they do
    not hold byte for byte goes to `NAME.onnx.data`.

    Raises:
        ConfigError: `checkpoint`, but no weight is stored there as the graph needs it.
    """
    if weights == "checkpoint":
        _point_into_checkpoint(graph, path, checkpoint)
        ir.save(graph, path)
        return
    _transpose_weights(graph)
    ir.save(
        graph, path, external_data=f"{path.name}.data" if weights == "external" else None, size_threshold_bytes=_SMALL
    )


def _transpose_weights(graph: ir.Model) -> None:
    """Store a weight as its only reader, a Transpose, gives it on. One that is also read as it is stays shared."""
    for node in list(graph.graph):
        (weight,) = node.inputs if node.op_type == "Transpose" else (None,)
        if weight is None or weight.const_value is None or len(weight.uses()) != 1:
            continue
        order = node.attributes["perm"].as_ints()
        name = weight.name
        turned = np.ascontiguousarray(weight.const_value.numpy().transpose(order))
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        graph.graph.remove(node, safe=True)
        weight.const_value = ir.Tensor(turned, name=name)
        weight.shape = ir.Shape(turned.shape)


def _point_into_checkpoint(graph: ir.Model, path: Path, checkpoint: Path) -> None:
    linked = [beside(file, path.parent) for file in weight_files(checkpoint)]
    stored = list(_tensors(linked))
    rest = []
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _SMALL:
            continue
        found = _find(tensor, stored)
        if found is None:
            rest.append(value)
        else:
            value.const_value = _pointer(value, found.file, found.offset, path.parent)
    if all(value in rest for value in _large(graph)):
        raise _nothing_fits(graph, stored, checkpoint)
    if rest:
        tensors = [value.const_value for value in rest if value.const_value is not None]
        moved = ir.external_data.convert_tensors_to_external(tensors, path.parent, f"{path.name}.data")
        for value, tensor in zip(rest, moved, strict=True):
            value.const_value = tensor


def _large(graph: ir.Model) -> list[ir.Value]:
    tensors = [value for value in graph.graph.initializers.values() if value.const_value is not None]
    return [value for value in tensors if value.const_value.nbytes >= _SMALL]


def beside(file: Path, folder: Path) -> Path:
    """`file` in `folder`, as the same file where the file system can, else as a copy."""
    source, target = file.resolve(), folder / file.name
    if target.exists():
        # Another graph of the same folder has brought it.
        return target
    try:
        # A read-only file could not be flushed to disk through its second name.
        if not os.access(source, os.W_OK):
            raise PermissionError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _tensors(files: list[Path]) -> Iterator[_Stored]:
    for file in files:
        header = read_header(file)
        for entry in header.tensors.values():
            yield _Stored(file, header, entry)


def _find(tensor: ir.TensorProtocol, stored: list[_Stored]) -> _Stored | None:
    """The stored tensor that is `tensor` byte for byte. Names do not tell: checkpoints leave prefixes out."""
    data: bytes | None = None
    for candidate in stored:
        if _DTYPES.get(candidate.entry.dtype) != tensor.dtype or candidate.entry.shape != tuple(tensor.shape.numpy()):
            continue
        data = tensor.tobytes() if data is None else data
        with candidate.file.open("rb") as file:
            file.seek(candidate.offset)
            if _equal(file, data):
                return candidate
    return None


def _equal(file: BinaryIO, data: bytes) -> bool:
    pieces = (data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK))
    return all(file.read(len(piece)) == piece for piece in pieces)


def _pointer(value: ir.Value, file: Path, offset: int, folder: Path) -> ir.ExternalTensor:
    tensor = value.const_value
    assert tensor is not None
    assert value.name is not None
    return ir.ExternalTensor(
        file.name, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=value.name, base_dir=folder
    )


def _nothing_fits(graph: ir.Model, stored: list[_Stored], checkpoint: Path) -> ConfigError:
    dtypes = ", ".join(sorted({candidate.entry.dtype for candidate in stored}))
    return ConfigError(
        "--weights checkpoint",
        expected="weights stored in the dtype of the export",
        found=f"{dtypes} in {checkpoint}",
        next_step="export with --dtype float16 or float32 as they are stored, or with --weights external",
    )
