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

from prefixkit.backbones.laid_out import MOST, LaidOut, ordered, size

LEAST = 256
"""Rows of states below which torch multiplies: filled up, they would be many more."""
STEP = 32
"""What numbers of rows are multiples of."""
_MACHINES = ("x86_64", "AMD64")
_PLAIN = (Tensor, nn.Parameter)


class FrozenLinear(nn.Linear):
    """A linear layer that multiplies by oneDNN while its weight is frozen, and as before whenever it is not."""

    laid_out: LaidOut | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not fits(input, self.weight, self.bias):
            return super().forward(input)
        return multiplied(input, self.weight, self.bias, laid_out=_own(self))


class FrozenConv1D(Conv1D):  # type: ignore[misc]
    """The same of GPT-2's linear layer, whose weight is [in, out]."""

    laid_out: LaidOut | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not fits(x, self.weight, self.bias):
            return super().forward(x)  # type: ignore[no-any-return]
        return multiplied(x, self.weight, self.bias, turned=True, laid_out=_own(self))


_OURS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}


def multiply_by_onednn(model: PreTrainedModel) -> None:
    """Let the linear layers of `model` multiply so until `multiply_by_torch` undoes it, on machines that have it.

    The first of them, up to `MOST` bytes, keep their weights laid out.
    """
    multiply_by_torch(model)
    left = MOST
    for layer in [module for module in model.modules() if type(module) in _OURS and works()]:
        if not _is_plain(layer.weight):
            continue
        layer.__class__ = _OURS[type(layer)]
        if size(layer.weight) <= left:
            left -= size(layer.weight)
            layer.laid_out = LaidOut()


def multiply_by_torch(model: PreTrainedModel) -> None:
    """Undo `multiply_by_onednn`."""
    before = {ours: theirs for theirs, ours in _OURS.items()}
    for layer in model.modules():
        if type(layer) in before:
            layer.__dict__.pop("laid_out", None)
            layer.__class__ = before[type(layer)]


def laid_out_bytes(model: nn.Module) -> int:
    """What the weights that `model` lays out will take once all of them are, both ways."""
    layers = (layer for layer in model.modules() if isinstance(layer, (FrozenLinear, FrozenConv1D)))
    return sum(size(layer.weight) for layer in layers if layer.laid_out is not None)


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


def multiplied(
    states: Tensor, weight: Tensor, bias: Tensor | None, *, turned: bool = False, laid_out: LaidOut | None = None
) -> Tensor:
    """[..., in] times `weight` [out, in]: [..., out]. Gradients go to states and bias alone.

    Args:
        turned: whether it is [in, out].
        laid_out: where it is kept in oneDNN's own order; None for as it lies.
    """
    if bias is None or not bias.requires_grad:
        return _Product.apply(states, weight, bias, turned, laid_out)  # type: ignore[no-any-return, no-untyped-call]
    return _Product.apply(states, weight, None, turned, laid_out) + bias  # type: ignore[no-any-return, no-untyped-call]


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
            right = F.linear(states, weight, bias)
            return all(torch.equal(_linear(states, each, bias), right) for each in (weight, ordered(weight)))
    except (AttributeError, RuntimeError, TypeError):  # torch promises nothing about operators of its own
        return False


class _Product(torch.autograd.Function):
    """[..., in] times a frozen weight [out, in], or [in, out] where it is `turned`: [..., out]."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, laid_out: LaidOut | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.turned, ctx.laid_out = turned, laid_out
        if laid_out is not None:
            return _linear(states, laid_out.operand(weight, turned), bias)
        return _linear(states, weight.T if turned else weight, bias)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        (weight,) = ctx.saved_tensors
        back = _Product.apply(given[0], weight, None, not ctx.turned, ctx.laid_out)  # type: ignore[no-untyped-call]
        return back, None, None, None, None


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


def _own(layer: FrozenLinear | FrozenConv1D) -> LaidOut | None:
    """Where the weight of `layer` is laid out; None for what stands in its place."""
    return layer.laid_out if "weight" not in layer.__dict__ else None


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is no quantised or spread one."""
    return type(tensor) in _PLAIN and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
