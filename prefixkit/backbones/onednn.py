"""Products with frozen float32 weights on a CPU by oneDNN, where torch itself takes MKL.

A frozen weight wants no gradient: a step is little else than products with it and its transpose. What
that gains is in tests/bench/README.md.

https://uxlfoundation.github.io/oneDNN; the operator is the one that torch.compile uses for frozen models.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LEAST = 256
"""Rows of states below which torch multiplies: filled up, they would be many more."""
STEP = 32
"""What numbers of rows are multiples of."""
_MACHINES = ("x86_64", "AMD64")
_PLAIN = (Tensor, nn.Parameter)


class FrozenLinear(nn.Linear):
    """A linear layer that multiplies by oneDNN while its weight is frozen, and as before whenever it is not."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not fits(input, self.weight, self.bias):
            return super().forward(input)
        return multiplied(input, self.weight, self.bias)


class FrozenConv1D(Conv1D):  # type: ignore[misc]
    """The same of GPT-2's linear layer, whose weight is [in, out]."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not fits(x, self.weight, self.bias):
            return super().forward(x)  # type: ignore[no-any-return]
        return multiplied(x, self.weight.T, self.bias)


_OURS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}


def multiply_by_onednn(model: PreTrainedModel) -> None:
    """Let the linear layers of `model` multiply so until `multiply_by_torch` undoes it, on machines that have it."""
    for layer in [module for module in model.modules() if type(module) in _OURS and works()]:
        if _is_plain(layer.weight):
            layer.__class__ = _OURS[type(layer)]


def multiply_by_torch(model: PreTrainedModel) -> None:
    """Undo `multiply_by_onednn`."""
    before = {ours: theirs for theirs, ours in _OURS.items()}
    for layer in model.modules():
        layer.__class__ = before.get(type(layer), type(layer))


def divides(module: nn.Module, chosen: Tensor) -> bool:
    """Whether `module` would multiply all rows of a batch by oneDNN, and by torch those where `chosen` is True.

    Their results differ in the last place, so that a run must not take now the one and now the other.
    """
    return _is_ours(module) and int(chosen.sum()) < LEAST <= chosen.numel()


def fits(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `multiplied` is to do it: enough rows, all of it float32 on a CPU, and nobody else with a say."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch.is_autocast_enabled("cpu") or weight.requires_grad or states.numel() < LEAST * max(1, states.shape[-1]):
        return False
    return all(map(_is_plain, (states, weight) if bias is None else (states, weight, bias)))


def multiplied(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., in] times `weight` [out, in], in any order: [..., out]. Gradients go to states and bias alone."""
    if bias is None or not bias.requires_grad:
        return _Product.apply(states, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _Product.apply(states, weight, None) + bias  # type: ignore[no-any-return, no-untyped-call]


def filled(rows: int) -> int:
    """How many rows a product of so many is made of: the next number of five binary digits, or multiple of `STEP`.

    oneDNN keeps 0.6 MiB for every number of rows that a weight of some shape meets.
    """
    step = max(STEP, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def filling(model: nn.Module, rows: int, columns: int) -> int:
    """How many more columns would give a batch as many rows of states as products with `model` are made of; else 0.

    Filled up once, nothing is filled up by every product.
    """
    states = rows * columns
    missing = filled(states) - states
    if states < LEAST or missing % rows or not _is_ours(model):
        return 0
    return missing // rows


@cache
def works() -> bool:
    """Whether this machine and this torch have the operator, and it multiplies."""
    if platform.machine() not in _MACHINES or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            states, weight, bias = (torch.ones(shape, dtype=torch.float32) for shape in ((3, 8), (16, 8), (16,)))
            return torch.equal(_linear(states, weight, bias), F.linear(states, weight, bias))
    except (AttributeError, RuntimeError, TypeError):  # torch promises nothing about operators of its own
        return False


class _Product(torch.autograd.Function):
    """[..., in] times a frozen weight: [..., out]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return _Product.apply(given[0], weight.T, None), None, None  # type: ignore[no-untyped-call]


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = states.reshape(-1, states.shape[-1]).contiguous()
    rows = len(flat)
    if more := filled(rows) - rows:
        flat = torch.cat([flat, flat.new_zeros(more, flat.shape[1])])
    found: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return found[:rows].view(*states.shape[:-1], -1)


def _is_ours(model: nn.Module) -> bool:
    """Whether a layer of `model` multiplies by oneDNN."""
    return any(type(module) in _OURS.values() for module in model.modules())


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is no quantised or spread one."""
    return type(tensor) in _PLAIN and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
