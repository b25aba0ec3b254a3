"""The prefixes of an encoder-decoder as a session holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefixkit.errors import InputError
from prefixkit.format.manifest import TaskRecord
from prefixkit.prefix import Prefix
from prefixkit.serving.prefix_table import ServedPrefix, converted


@dataclass(frozen=True, eq=False)
class ServedPrefixes:
    """What one row has before its texts.

    Attributes:
        parts: by place, of `encoder.self`, `decoder.self` and `decoder.cross`; any of them may be missing.
        task: the usage contract, None where the file states none.
    """

    parts: Mapping[str, ServedPrefix]
    task: TaskRecord | None

    @property
    def text_start(self) -> int:
        """Both texts start at position 0, as if there were no prefix."""
        return 0


def served_prefixes(prefix: Prefix, dtype: np.dtype[Any]) -> ServedPrefixes:
    """A loaded prefix as graphs of `dtype` take it.

    Raises:
        InputError: something else than keys and values, text that starts elsewhere than at 0, or numbers that float16
            cannot hold.
    """
    where = f"prefix for {prefix.manifest.backbone.name}"
    parts = {}
    for record in prefix.manifest.injections:
        if record.kind != "key_value_prefix" or record.stack is None or record.attention is None:
            raise InputError(where, expected="keys and values", found=record.kind)
        if record.positions is not None and record.positions.text_start != 0:
            found = f"one that starts at {record.positions.text_start}"
            raise InputError(where, expected="text that starts at 0: the prefix takes no positions", found=found)
        tensors = converted(prefix, record.stack, record.attention, dtype)
        parts[f"{record.stack}.{record.attention}"] = ServedPrefix(tensors, tensors[0].shape[1], 0, None)
    return ServedPrefixes(parts, prefix.manifest.task)


def part(prefixes: Sequence[ServedPrefixes | None], place: str) -> list[ServedPrefix | None]:
    """What each row of a batch has in one place."""
    return [prefix.parts.get(place) if prefix is not None else None for prefix in prefixes]
