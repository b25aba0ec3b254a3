"""Operators that a graph is to have whole, in the place of the pieces that `transformers` writes them in.

Gelu, RMSNormalization and RotaryEmbedding are put in while a model is traced, wherever they are seen to compute
what the model's own code computes; a pattern that is looked for in the finished graph is missed in half precision.
Attention that rotates by itself asks what a tensor was before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from onnxscript.values import Opset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from prefixkit.backbones import own_forward
from prefixkit.backbones.fused import WRITTEN_OUT

_OP = Opset("", 24)
_CLOSE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ROTATE = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Rotated:
    """What `rotate` was given, and what it gave."""

    before: Tensor
    cos: Tensor
    sin: Tensor
    after: Tensor


# By the identity of what came out, which is kept, so that no other tensor has it.
_ROTATED: ContextVar[dict[int, Rotated]] = ContextVar("rotated")


@torch.library.custom_op("prefixkit::rms_norm", mutates_args=())
def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation over the last dimension, in float32 (Zhang and Sennrich 2019)."""
    exact = states.float()
    normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(states.dtype) * weight


@torch.library.custom_op("prefixkit::rotate", mutates_args=())
def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`states` [batch, heads, seq, dim], its first dims rotated by `cos`, `sin` [batch, seq, half] (Su et al. 2021).

    Twice as many as they have are rotated; what stands behind stays as it is.
    """
    half = cos.shape[-1]
    left, right, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)


@rms_norm.register_fake
def _(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(states)


@rotate.register_fake
def _(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(states)


def _rms_norm_node(states: Any, weight: Any, eps: float) -> Any:
    return _OP.RMSNormalization(states, weight, axis=-1, epsilon=eps)


def _rotate_node(states: Any, cos: Any, sin: Any) -> Any:
    # 0 is the whole of a head.
    return _OP.RotaryEmbedding(states, cos, sin, rotary_embedding_dim=2 * cos.shape[-1])


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.prefixkit.rms_norm.default: _rms_norm_node,
    torch.ops.prefixkit.rotate.default: _rotate_node,
}


@contextmanager
def emitted(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` compute through these operators, in a `with` block, where they give what its own code gives."""
    with ExitStack() as stack:
        stack.callback(_ROTATED.reset, _ROTATED.set({}))
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                stack.enter_context(_norm(module))
            elif isinstance(module, WRITTEN_OUT):
                stack.enter_context(_gelu(module))
        for file in {sys.modules[type(module).__module__] for module in model.modules()}:
            if hasattr(file, _ROTATE):
                stack.enter_context(_rotation(file, model.dtype))
        yield


def rotation_of(states: Tensor) -> Rotated | None:
    """How `states` came out of the model's rotation; None where they did not, or were changed since."""
    return _ROTATED.get().get(id(states))


@contextmanager
def _norm(module: nn.Module) -> Iterator[None]:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight: Any = getattr(module, "weight", None)
    if eps is None or weight is None:
        yield
        return
    probe = _probe(2, 3, *weight.shape, dtype=weight.dtype)
    expected = module(probe)
    # Gemma counts its weights from one.
    for scale in (weight, 1.0 + weight):
        if _equal(rms_norm(probe, scale, eps), expected):
            own_forward.give(module, lambda states, scale=scale: rms_norm(states, scale, eps))
            break
    try:
        yield
    finally:
        own_forward.take_away(module)


@contextmanager
def _gelu(module: nn.Module) -> Iterator[None]:
    own_forward.give(module, partial(F.gelu, approximate="tanh"))
    try:
        yield
    finally:
        own_forward.take_away(module)


@contextmanager
def _rotation(file: Any, dtype: torch.dtype) -> Iterator[None]:
    own = getattr(file, _ROTATE)

    def whole(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        half = cos.shape[-1] // 2
        turns = cos[..., :half].to(query.dtype), sin[..., :half].to(query.dtype)
        return _noted(query, *turns), _noted(key, *turns)

    probe = _rotary_probe(dtype)
    if all(_equal(*pair) for pair in zip(whole(*probe), own(*probe), strict=True)):
        setattr(file, _ROTATE, whole)
    try:
        yield
    finally:
        setattr(file, _ROTATE, own)


def _noted(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    found = Rotated(states, cos, sin, rotate(states, cos, sin))
    _ROTATED.get()[id(found.after)] = found
    return found.after


def _rotary_probe(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    angles = _probe(2, 3, 4, dtype=torch.float32).repeat(1, 1, 2)
    query, key = _probe(2, 4, 3, 8, dtype=dtype), _probe(2, 2, 3, 8, dtype=dtype)
    return query, key, angles.cos().to(dtype), angles.sin().to(dtype)


def _probe(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _equal(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= _CLOSE[expected.dtype])
