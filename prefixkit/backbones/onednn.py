"""Products with frozen float32 weights on a CPU by oneDNN, where torch itself takes MKL.

A frozen weight never changes and wants no gradient: a step is little else than products with it and its transpose, and
both can be laid out once, in the order in which oneDNN reads them. What that gains is in tests/bench/README.md.

https://uxlfoundation.github.io/oneDNN; the operators are those that torch.compile uses for frozen models.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefixkit.backbones import own_forward

MOST = 512 << 20
"""Bytes of weights laid out anew, beside the model's own: what is more is read as it lies, 3 % slower."""
_LAYERS = (nn.Linear, Conv1D)
_MACHINES = ("x86_64", "AMD64")
_ROWS = 1024
"""For how many rows a weight is laid out: oneDNN wants to be told, and reads it for any other number as well."""


def multiply_by_onednn(model: PreTrainedModel, most: int = MOST) -> None:
    """Let the linear layers of a frozen `model` multiply by oneDNN, until `multiply_by_torch` undoes it.

    Nothing happens on another device than a CPU with x86's instructions, in another dtype than float32, and to layers
    of other classes. Whatever stands in the place of a weight is multiplied as before.

    Args:
        most: bytes of weights that are laid out anew.
    """
    for layer in _layers(model) if works() else ():
        if own_forward.has_one(layer) or not _is_plain(layer.weight):
            continue
        there = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T
        ways = (there, there.T)
        if (size := 2 * there.nbytes) <= most:
            most -= size
            ways = (_laid_out(there), _laid_out(there.T))
        own_forward.give(layer, _forward(layer, *ways))


def multiply_by_torch(model: PreTrainedModel) -> None:
    """Undo `multiply_by_onednn`."""
    for layer in _layers(model):
        own_forward.take_away(layer)


@cache
def works() -> bool:
    """Whether this machine and this torch have the operators, and they multiply."""
    if platform.machine() not in _MACHINES or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    states, weight, bias = torch.ones(3, 8), torch.arange(128.0).view(16, 8), torch.arange(16.0)
    expected = F.linear(states, weight, bias)
    try:
        return all(torch.equal(_linear(states, way, bias), expected) for way in (weight, _laid_out(weight)))
    except (AttributeError, RuntimeError, TypeError):  # torch promises nothing about operators of its own
        return False


class _Product(torch.autograd.Function):
    """[..., in] times a frozen weight: [..., out]. The gradient goes to the states alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, there: Tensor, back: Tensor, bias: Tensor | None) -> Tensor:
        ctx.back = back
        return _linear(states, there, bias)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        return _linear(given[0], ctx.back, None), None, None, None


def _forward(layer: Any, there: Tensor, back: Tensor) -> Callable[[Tensor], Tensor]:
    by_torch, frozen, known = layer.forward, layer.weight, _contents(layer.weight)

    def forward(states: Tensor) -> Tensor:
        if not _is_plain(states) or not states.numel() or layer.weight is not frozen or _contents(frozen) != known:
            return by_torch(states)  # type: ignore[no-any-return]
        bias = layer.bias
        if bias is None or not bias.requires_grad:
            return _Product.apply(states, there, back, bias)  # type: ignore[no-any-return, no-untyped-call]
        return _Product.apply(states, there, back, None) + bias  # type: ignore[no-any-return, no-untyped-call]

    return forward


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`weight` is [out, in], in any order."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return found


def _laid_out(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return found


def _layers(model: PreTrainedModel) -> Iterator[Any]:
    return (module for module in model.modules() if type(module) in _LAYERS)


def _is_plain(tensor: Tensor) -> bool:
    """Whether nobody else has a say: no quantised or spread weight, no compiler that looks on."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _contents(weight: Tensor) -> tuple[int, int]:
    """Another one when `weight` has been changed or exchanged."""
    return weight.data_ptr(), weight._version
