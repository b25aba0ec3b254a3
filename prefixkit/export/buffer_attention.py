"""Attention over buffers of a fixed capacity, as single ONNX operators: new keys and values are written in place.

Each row has its own place to write at, so that rows with prefixes of different lengths and texts of different lengths
stand in one batch without padding between. What lies behind a row's newest token is never seen: it may be anything.

- `scattered`: TensorScatter and Attention of opset 24 (ONNX 1.19), for any number of new tokens; layers with a sliding
  window or a soft cap are given a mask.
- `grouped`: onnxruntime's GroupQueryAttention, which rotates, writes and attends in one, to the used slots alone; for
  one new token a row, or any number in a single row; see `prefixkit.export.grouped_attention`.
- `shared`: TensorScatter, and attention in pieces to the buffers and to a prefix beside them that rows share; see
  `prefixkit.export.shared_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from onnxscript.values import Opset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from prefixkit.export.buffer_writing import KeyValue, Writing
from prefixkit.export.grouped_attention import attend_grouped
from prefixkit.export.rounded_cache import from_eight_bits, in_eight_bits
from prefixkit.export.shared_attention import TRANSLATIONS as SHARED
from prefixkit.export.shared_attention import attend_shared, visible_behind

OPSET = 24
_NAME = "prefixkit_buffers"
_OP = Opset("", OPSET)
_WRITING: ContextVar[Writing] = ContextVar("writing")


@contextmanager
def writing(model: PreTrainedModel, where: Writing) -> Iterator[None]:
    """Send the attention of `model` through ours, in a `with` block."""
    previous, token = model.config._attn_implementation, _WRITING.set(where)
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = previous
        _WRITING.reset(token)


@torch.library.custom_op("prefixkit::tensor_scatter", mutates_args=())
def tensor_scatter(buffer: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """`buffer` [batch, heads, capacity, dim] with `new` [batch, heads, seq, dim] from slot `index` [batch] on."""
    slots = index[:, None] + torch.arange(new.shape[2], device=new.device)
    return buffer.scatter(2, slots[:, None, :, None].expand(new.shape), new)


@torch.library.custom_op("prefixkit::attend_valid", mutates_args=())
def attend_valid(query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float) -> Tensor:
    """Causal attention of `query` [batch, heads, seq, dim], the newest of the first `valid` [batch] slots."""
    slots = torch.arange(key.shape[2], device=key.device)
    last = valid[:, None] - query.shape[2] + torch.arange(query.shape[2], device=key.device)
    mask = (slots <= last[..., None])[:, None]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


@torch.library.custom_op("prefixkit::attend_masked", mutates_args=())
def attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention where `mask` [batch, 1, seq, capacity] is True, of scores that stay below `softcap` (0: any)."""
    repeated = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeated, 1).mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    shares = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return shares @ value.repeat_interleave(repeated, 1)


@tensor_scatter.register_fake
def _(buffer: Tensor, new: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(buffer)


@attend_valid.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@attend_masked.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _scatter_node(buffer: Any, new: Any, index: Any) -> Any:
    return _OP.TensorScatter(buffer, new, index, axis=2, mode="linear")


def _valid_node(query: Any, key: Any, value: Any, valid: Any, scale: float) -> Any:
    return _OP.Attention(query, key, value, None, None, None, valid, is_causal=1, scale=scale)[0]


def _masked_node(query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float) -> Any:
    return _OP.Attention(query, key, value, mask, scale=scale, softcap=softcap)[0]


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.prefixkit.tensor_scatter.default: _scatter_node,
    torch.ops.prefixkit.attend_valid.default: _valid_node,
    torch.ops.prefixkit.attend_masked.default: _masked_node,
    **SHARED,
}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    where, layer = _WRITING.get(), int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if where.form == "grouped":
        return attend_grouped(where, layer, (query, key, value), scale, sliding_window, softcap or 0.0), None
    keys, values = _scattered(where, layer, (key, value))
    if where.seen is not None:
        given = _read(where, layer, where.shared[layer], query)
        sizes = (query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1])
        mask = visible_behind(where.seen, given[0].shape[2], where.index, sizes, sliding_window)
        found = attend_shared(query, *given, keys, values, mask, scale, softcap or 0.0)
    elif sliding_window is None and not softcap:
        found = attend_valid(query, keys, values, where.index + query.shape[2], scale)
    else:
        mask = visible(where.index, query.shape[2], keys.shape[2], sliding_window)
        found = attend_masked(query, keys, values, mask, scale, softcap or 0.0)
    return found.transpose(1, 2), None


def _scattered(where: Writing, layer: int, new: KeyValue) -> KeyValue:
    """Keys and values of a layer with what is new, as they are read."""
    kept = new
    if where.scales:
        kept = (in_eight_bits(new[0], where.scales[layer][0]), in_eight_bits(new[1], where.scales[layer][1]))
    keys, values = where.buffers[layer]
    where.written[layer] = (tensor_scatter(keys, kept[0], where.index), tensor_scatter(values, kept[1], where.index))
    return _read(where, layer, where.written[layer], new[0])


def _read(where: Writing, layer: int, kept: KeyValue, like: Tensor) -> KeyValue:
    if not where.scales:
        return kept
    key, value = where.scales[layer]
    return from_eight_bits(kept[0], key, like), from_eight_bits(kept[1], value, like)


def visible(index: Tensor, seq: int, capacity: int, window: int | None) -> Tensor:
    """[batch, 1, seq, capacity]: which slots the new tokens from slot `index` [batch] on see."""
    slots = torch.arange(capacity, device=index.device)
    own = (index[:, None] + torch.arange(seq, device=index.device))[..., None]
    seen = slots <= own if window is None else (slots <= own) & (slots > own - window)
    return seen[:, None]


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
