"""Attention to a prefix that rows share, and to what each has in its own buffer, under one softmax.

As Hydragen does (Juravsky et al. 2024, arXiv 2402.05099), the queries of all rows are multiplied by the shared keys at
once: these are read from memory once, not once a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript.values import Opset
from torch import Tensor

_OP = Opset("", 24)
_END = 2**62
"""Behind every slot."""
_LEAST = -65504.0
"""The least of float16: beside any other score it has no share, in any dtype."""


@torch.library.custom_op("prefixkit::attend_shared", mutates_args=())
def attend_shared(
    query: Tensor,
    shared_key: Tensor,
    shared_value: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention of `query` [batch, heads, seq, dim]; gives the same shape.

    Args:
        shared_key, shared_value: [1, kv_heads, prefix, dim].
        key, value: of each row, [batch, kv_heads, capacity, dim].
        mask: [1, batch, heads / kv_heads * seq, prefix + capacity], where it sees something.
        softcap: what scores stay below; 0 is any.
    """
    keys, values = (
        torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=2)
        for shared, own in ((shared_key, key), (shared_value, value))
    )
    grouped = (query * scale).reshape(*key.shape[:2], -1, key.shape[-1])
    scores = grouped @ keys.mT
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    shares = scores.masked_fill(~mask.transpose(0, 1), torch.finfo(scores.dtype).min).softmax(dim=-1)
    return (shares @ values).reshape(*query.shape[:-1], value.shape[-1])


@attend_shared.register_fake
def _(query: Tensor, shared_key: Tensor, shared_value: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _shared_node(
    query: Any, shared_key: Any, shared_value: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float
) -> Any:
    heads, kv_heads, dim, value_dim = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
    asked = _OP.Reshape(_OP.Mul(query, _number(scale, query)), [0, kv_heads, -1, dim])
    # Behind the heads come the rows, so that what belongs to the long prefix is never turned around.
    turned = _OP.Transpose(asked, perm=[1, 0, 2, 3])
    rows, length = _OP.Shape(turned, start=0, end=3), _OP.Shape(shared_key, start=2, end=3)
    together = _OP.MatMul(_OP.Reshape(turned, [1, kv_heads, -1, dim]), _turned(shared_key))
    own = _OP.Transpose(_OP.MatMul(asked, _turned(key)), perm=[1, 0, 2, 3])
    scores = _OP.Concat(_OP.Reshape(together, _OP.Concat(rows, length, axis=0)), own, axis=-1)
    if softcap:
        most = _number(softcap, query)
        scores = _OP.Mul(_OP.Tanh(_OP.Div(scores, most)), most)
    shares = _OP.Softmax(_OP.Where(mask, scores, _number(_LEAST, query)), axis=-1)
    zero, end, axis = (_OP.Constant(value_ints=[number]) for number in (0, _END, 3))
    of_shared, of_own = _OP.Slice(shares, zero, length, axis), _OP.Slice(shares, length, end, axis)
    found = _OP.MatMul(_OP.Reshape(of_shared, _OP.Shape(together)), shared_value)
    found = _OP.Transpose(_OP.Reshape(found, _OP.Concat(rows, _OP.Shape(value, start=3), axis=0)), perm=[1, 0, 2, 3])
    found = _OP.Add(found, _OP.MatMul(_OP.Transpose(of_own, perm=[1, 0, 2, 3]), value))
    return _OP.Reshape(found, [0, heads, -1, value_dim])


def _turned(key: Any) -> Any:
    return _OP.Transpose(key, perm=[0, 1, 3, 2])


def _number(value: float, like: Any) -> Any:
    return _OP.CastLike(_OP.Constant(value_float=value), like)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.prefixkit.attend_shared.default: _shared_node}


def visible_behind(seen: Tensor, length: int, index: Tensor, sizes: tuple[int, int, int], window: int | None) -> Tensor:
    """Which shared and own slots the new tokens from slot `index` [batch] on see, as `attend_shared` takes it.

    Args:
        seen: [batch], how many of the first of `length` shared slots stand before a row's own; 0 where it shares none.
        sizes: new tokens, slots of a row, and query heads to a head of keys.
    """
    seq, capacity, group = sizes
    given = torch.arange(length, device=index.device) - seen[:, None]
    slots = torch.arange(capacity, device=index.device).expand(index.shape[0], capacity)
    # Places count from a row's own first slot: what it shares stands before that, what it does not share behind all.
    places = torch.cat([torch.where(given < 0, given, _END), slots], dim=-1)[:, None]
    # Numbers are repeated, and not what comes of them: on a GPU there is no Tile of booleans.
    newest = (index[:, None] + torch.arange(seq, device=index.device).repeat(group))[..., None]
    near = places <= newest
    return (near if window is None else near & (places > newest - window))[None]
