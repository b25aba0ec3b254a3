"""Weights of four or eight bits in the graph: MatMulNBits of onnxruntime, blocks of 32 with one scale each.

What a graph multiplies by is integers times scales, so the model in PyTorch is given exactly these numbers before it is
traced: parity is then held against it as for any other export, and what rounding costs is another question, which
`tests/bench/served_precision.py` answers. Embeddings and the output layer are kept as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefixkit.errors import ConfigError

BITS = {"int4": 4, "int8": 8}
BLOCK = 32
_MULTIPLIES = ("MatMul", "FusedMatMul", "Gemm")


@dataclass(frozen=True)
class Rounded:
    """The weight of a linear layer, [inputs, outputs], in whole numbers.

    Attributes:
        packed: [outputs, blocks, bytes of a block], two numbers of four bits a byte, the lower one first.
        scales: [outputs, blocks] in the dtype of the export.
    """

    bits: int
    inputs: int
    packed: Tensor
    scales: Tensor

    def weight(self) -> Tensor:
        """[inputs, outputs]: the numbers that a graph multiplies by."""
        packed = self.packed.int()
        levels = torch.stack([packed & 15, packed >> 4], -1).flatten(-2) if self.bits == 4 else packed
        exact = (levels - 2 ** (self.bits - 1)) * self.scales.float()[..., None]
        weight: Tensor = exact.flatten(1)[:, : self.inputs].T
        return weight.to(self.scales.dtype)


def round_linear(model: PreTrainedModel, kind: str) -> dict[str, Rounded]:
    """Round the weights of the linear layers of `model`, in place, but for its output layer.

    Args:
        kind: `int4` or `int8`.

    Returns:
        Them by the names of the parameters.

    Raises:
        ConfigError: the model has no such layers.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
            turned = isinstance(module, nn.Linear)
            weight = module.weight.data.T if turned else module.weight.data
            rounded = _rounded(weight, BITS[kind])
            module.weight.data = rounded.weight().T.contiguous() if turned else rounded.weight().contiguous()
            found[f"{name}.weight"] = rounded
    if not found:
        where = model.config.model_type
        raise ConfigError("--quantize", expected="linear layers", found=f"none in {where}", next_step="leave it out")
    return found


def _rounded(weight: Tensor, bits: int) -> Rounded:
    quantizer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=True, bits=bits))
    packed, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight.float().numpy()))
    return Rounded(bits, weight.shape[0], torch.from_numpy(packed), torch.from_numpy(scales).to(weight.dtype))


def multiply_in_blocks(graph: ir.Model, weights: Mapping[str, Rounded]) -> None:
    """Let `graph` multiply by `weights`, where it multiplied by the parameters that they were."""
    for node in [node for node in graph.graph if node.op_type in _MULTIPLIES]:
        by = node.inputs[1]
        if by is None or by.name not in weights:
            continue
        rounded = weights[by.name]
        inputs = [node.inputs[0], *_stored(graph, by.name, rounded)]
        if len(node.inputs) == 3:  # the bias of a Gemm
            inputs += [None, None, node.inputs[2]]
        sizes = {"K": rounded.inputs, "N": rounded.packed.shape[0], "bits": rounded.bits, "block_size": BLOCK}
        made = ir.node("MatMulNBits", inputs, sizes, domain="com.microsoft", outputs=[ir.Value()])
        graph.graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(node.outputs[0], made.outputs[0])
        made.outputs[0].name = node.outputs[0].name
        graph.graph.remove(node, safe=True)
        if not by.uses():
            del graph.graph.initializers[by.name]


def _stored(graph: ir.Model, name: str, rounded: Rounded) -> list[ir.Value]:
    """The two initializers of a weight, which several nodes may share."""
    known = graph.graph.initializers
    for part, tensor in _parts(name, rounded).items():
        if part not in known:
            made = ir.Value(name=part, const_value=ir.tensor_adapters.TorchTensor(tensor, name=part))
            made.shape, made.dtype = ir.Shape(tensor.shape), made.const_value.dtype if made.const_value else None
            graph.graph.register_initializer(made)
    return [known[part] for part in _parts(name, rounded)]


def _parts(name: str, rounded: Rounded) -> dict[str, Tensor]:
    return {f"{name}.packed": rounded.packed, f"{name}.scales": rounded.scales}


def save_rounded(model: PreTrainedModel, weights: Mapping[str, Rounded], path: Path) -> None:
    """Write the parameters of `model` to a safetensors file, with `weights` in the place of what they were."""
    kept = {name: tensor for name, tensor in model.named_parameters() if name not in weights}
    rounded = {part: tensor for name, each in weights.items() for part, tensor in _parts(name, each).items()}
    save_file({name: tensor.detach().contiguous() for name, tensor in {**kept, **rounded}.items()}, path)


def described(kind: str) -> dict[str, Any]:
    """What `export.json` says of it."""
    return {
        "weights": kind,
        "block_size": BLOCK,
        "scales": "one a block, symmetric",
        "kept": "embeddings, output layer",
    }
