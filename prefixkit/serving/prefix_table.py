"""Prefixes as a session holds them: arrays in the graph's dtype, by name, and as the past of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefixkit.errors import InputError
from prefixkit.format.manifest import LayerGeometry, TaskRecord
from prefixkit.prefix import Prefix, key_values

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class ServedPrefix:
    """One prefix, ready to stand before a text.

    Attributes:
        tensors: key and value of each layer, [kv_heads, length, head_dim], in the graph's dtype.
        length: slots.
        text_start: the position id of the first token behind it.
        task: the usage contract, None where the file states none.
    """

    tensors: tuple[Array, ...]
    length: int
    text_start: int
    task: TaskRecord | None


def served(prefix: Prefix, dtype: np.dtype[Any]) -> ServedPrefix:
    """A loaded prefix as a graph of `dtype` takes it.

    Raises:
        InputError: a prefix without keys and values, in slots of the text, or with numbers that float16 cannot hold.
    """
    tensors = converted(prefix, "decoder", "self", dtype)
    record = next(record for record in prefix.manifest.injections if record.kind == "key_value_prefix")
    text_start = record.positions.text_start if record.positions is not None else tensors[0].shape[1]
    return ServedPrefix(tensors, tensors[0].shape[1], text_start, prefix.manifest.task)


def converted(prefix: Prefix, stack: str, attention: str, dtype: np.dtype[Any]) -> tuple[Array, ...]:
    """Key and value of each layer of an attention, in `dtype`. Raises InputError as `served` does."""
    if any(record.infix for record in prefix.manifest.injections):
        found, step = "one in slots of the text", "`prefixkit eval` runs it"
        where = f"prefix for {prefix.manifest.backbone.name}"
        raise InputError(where, expected="a prefix before the text", found=found, next_step=step)
    tensors = tuple(array for pair in key_values(prefix, stack=stack, attention=attention) for array in pair)
    if all(array.dtype == dtype for array in tensors):
        return tuple(map(np.ascontiguousarray, tensors))
    with np.errstate(over="ignore"):
        # float32 first: bfloat16 reaches float16 only through it.
        made = tuple(np.ascontiguousarray(array.astype(np.float32).astype(dtype)) for array in tensors)
    if not all(np.isfinite(array).all() for array in made):
        raise InputError(
            f"prefix for {prefix.manifest.backbone.name}",
            expected=f"numbers that {dtype} can hold",
            found="larger ones",
            next_step="use a float32 export",
        )
    return made


def stacked(
    prefixes: Sequence[ServedPrefix | None], layers: Sequence[LayerGeometry], dtype: np.dtype[Any]
) -> list[Array]:
    """Key and value of each layer for a batch, [batch, kv_heads, longest, head_dim], padded with zeros on the left."""
    longest = max((prefix.length for prefix in prefixes if prefix is not None), default=0)
    sizes = [(layer.kv_heads, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
    batch = [np.zeros((len(prefixes), heads, longest, dim), dtype=dtype) for heads, dim in sizes]
    for row, prefix in enumerate(prefixes):
        if prefix is not None and prefix.length:
            for rows, tensor in zip(batch, prefix.tensors, strict=True):
                rows[row, :, -prefix.length :] = tensor
    return batch


def real_slots(prefixes: Sequence[ServedPrefix | None]) -> Array:
    """[batch, longest]: 1 where `stacked` has a slot, 0 where it has padding."""
    lengths = np.array([prefix.length if prefix is not None else 0 for prefix in prefixes], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    mask: Array = (np.arange(longest) >= longest - lengths[:, None]).astype(np.int64)
    return mask
