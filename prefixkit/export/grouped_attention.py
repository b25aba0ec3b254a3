"""onnxruntime's GroupQueryAttention: one operator that rotates, writes new keys and values, and attends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixkit.export.buffer_writing import Writing
from prefixkit.export.emitted import rotation_of

_HEAD = 16
"""What GroupQueryAttention wants the dimensions of a head to be a multiple of, if it is to rotate them."""


def attend_grouped(
    where: Writing, layer: int, new: tuple[Tensor, Tensor, Tensor], scale: float, window: int | None, softcap: float
) -> Tensor:
    """What the newest tokens of each row see: [batch, seq, heads, head_dim].

    Args:
        layer: whose buffers are written and read.
        new: query [batch, heads, seq, head_dim], key and value [batch, kv_heads, seq, head_dim].
        scale: of the scores.
        window: how many tokens a query sees, its own among them; None for all.
        softcap: what scores stay below; 0 for any.
    """
    (batch, heads, seq, dim), kv_heads = new[0].shape, new[1].shape[1]
    keys, values = where.buffers[layer]
    turns, unrotated = _turns(new[0], new[1], keys.shape[2])
    more, kinds = _rounding(where, layer, turns)
    query, key, value = (tensor.transpose(1, 2).flatten(2) for tensor in (*unrotated, new[2]))
    found, *written = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (query, key, value, keys, values, (where.index + (seq - 1)).to(torch.int32), _capacity(keys), *more),
        {
            "do_rotary": int(bool(turns)),
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": scale,
            "softcap": softcap,
            "local_window_size": -1 if window is None else window,
            **kinds,
        },
        dtypes=(query.dtype, keys.dtype, values.dtype),
        shapes=(query.shape, keys.shape, values.shape),
        version=1,
    )
    where.written[layer] = (written[0], written[1])
    return found.view(batch, seq, heads, dim)


def _turns(query: Tensor, key: Tensor, capacity: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """What GroupQueryAttention rotates by, and what it is to rotate: nothing, and both as they are, where it cannot.

    Its tables of cosines and sines have to have as many lines as a buffer has slots. There is one for each token,
    made for its position in this pass, so that no position is without; those behind are never looked at.
    """
    rotated, other = rotation_of(query), rotation_of(key)
    if rotated is None or other is None or query.shape[-1] % _HEAD or rotated.cos.shape[-1] % (_HEAD // 2):
        return (), (query, key)
    batch, seq, half = rotated.cos.shape
    tokens = torch.arange(batch * seq, device=query.device)
    lines = torch.cat([tokens, tokens.new_zeros(capacity)])
    tables = [turn.reshape(-1, half).index_select(0, lines) for turn in (rotated.cos, rotated.sin)]
    return (*tables, tokens.view(batch, seq)), (rotated.before, other.before)


def _rounding(
    where: Writing, layer: int, turns: tuple[Tensor, ...]
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """The last inputs of GroupQueryAttention, from those that it rotates by on, and what it is told of scales."""
    if not where.scales:
        return turns, {}
    key, value = (scale[None] for scale in where.scales[layer])
    kinds = {f"{which}_quant_type": "PER_CHANNEL" for which in ("k", "v")}
    # Between them it would take a bias and sinks.
    return (*(turns or (None, None, None)), None, None, key, value), {**kinds, "kv_cache_bit_width": 8}


def _capacity(buffer: Tensor) -> Tensor:
    """The length of a buffer, as GroupQueryAttention wants it."""
    return torch.full((1,), buffer.shape[2], dtype=torch.int32)
