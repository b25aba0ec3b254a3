"""Keys and values in whole numbers of eight bits, and what one of them stands for: by layer, head and channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from prefixkit.errors import FormatError, InputError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.serving.prefix_table import Array

LARGEST = 127
MOST_LOST = 0.03
"""How much of a prefix may be lost: of the length of all its keys, or values, of a layer. Rounding takes about 0.01."""


@dataclass(frozen=True)
class CacheScales:
    """What 1 stands for.

    Attributes:
        tensors: of key and value of each layer, [kv_heads, 1, head_dim], float32.
    """

    tensors: tuple[Array, ...]

    def rounded(self, tensors: Sequence[Array]) -> list[Array]:
        """Key and value of each layer, [kv_heads, length, head_dim], in whole numbers; what is larger is cut."""
        divided = (each.astype(np.float32) / scale for each, scale in zip(tensors, self.tensors, strict=True))
        return [np.rint(each).clip(-LARGEST - 1, LARGEST).astype(np.int8) for each in divided]

    def lost(self, tensors: Sequence[Array]) -> list[float]:
        """The share of each of `tensors` that `rounded` takes from it, as lengths of vectors."""
        kept = (each * scale for each, scale in zip(self.rounded(tensors), self.tensors, strict=True))
        exact = (each.astype(np.float32) for each in tensors)
        return [_length(one - other) / max(_length(one), 1e-30) for one, other in zip(exact, kept, strict=True)]

    def refuse_larger(self, where: str, tensors: Sequence[Array]) -> None:
        """Raise InputError for a prefix of which more than `MOST_LOST` would be lost."""
        for place, share in enumerate(self.lost(tensors)):
            if share > MOST_LOST:
                which = "values" if place % 2 else "keys"
                raise InputError(
                    where,
                    expected=f"{which} that the export's eight bits can hold, within {MOST_LOST:.0%}",
                    found=f"{share:.0%} lost in layer {place // 2}",
                    next_step="export again with this prefix, or without --kv-cache",
                )


def _length(tensor: Array) -> float:
    return float(np.linalg.norm(tensor))


def scale_names(layers: int) -> list[str]:
    """The tensors of the file of scales: key and value of each layer."""
    return [f"{layer}.{which}" for layer in range(layers) for which in ("key", "value")]


def read_scales(path: Path, layers: Sequence[LayerGeometry]) -> CacheScales:
    """Read the file of scales. Raises FormatError where it is not for these layers."""
    shapes = [(layer.kv_heads, 1, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
    found = load_file(path)
    tensors = tuple(found[name] for name in scale_names(len(layers)) if name in found)
    if [tensor.shape for tensor in tensors] != shapes:
        raise FormatError(path, expected=f"scales of {len(layers)} layers", found="others", next_step="export again")
    return CacheScales(tensors)
