"""Keys and values in whole numbers of eight bits, and what one of them stands for: by layer, head and channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from prefixkit.errors import FormatError, InputError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.serving.prefix_table import Array

LARGEST = 127
MOST_LOST = 0.03
"""How much of a prefix may be lost: of the length of all its keys, or values, of a layer. Rounding takes about 0.01."""
_STEP = "export again with this prefix, or without --kv-cache"


@dataclass(frozen=True)
class CacheScales:
    """What 1 stands for.

    Attributes:
        tensors: of key and value of each layer, [kv_heads, 1, head_dim], float32.
    """

    tensors: tuple[Array, ...]

    def rounded(self, tensors: Sequence[Array]) -> list[Array]:
        """Key and value of each layer, [kv_heads, length, head_dim], in whole numbers; what is larger is cut."""
        divided = (each.astype(np.float64) / scale for each, scale in zip(tensors, self.tensors, strict=True))
        return [np.rint(each).clip(-LARGEST - 1, LARGEST).astype(np.int8) for each in divided]

    def lost(self, tensors: Sequence[Array]) -> list[float]:
        """The share of each of `tensors` that `rounded` takes from it, as lengths of vectors."""
        kept = (each * scale for each, scale in zip(self.rounded(tensors), self.tensors, strict=True))
        exact = (each.astype(np.float64) for each in tensors)
        return [_length(one - other) / max(_length(one), 1e-30) for one, other in zip(exact, kept, strict=True)]

    def refuse_larger(
        self, where: str, tensors: Sequence[Array], *, most: float = MOST_LOST, next_step: str = _STEP
    ) -> None:
        """Raise InputError for keys and values, such as a prefix has, of which more than `most` would be lost."""
        for place, share in enumerate(self.lost(tensors)):
            if not share <= most:
                which = "values" if place % 2 else "keys"
                expected = f"{which} of layer {place // 2} that eight bits can hold, within {most:.0%}"
                raise InputError(where, expected=expected, found=f"{share:.0%} lost", next_step=next_step)


def _length(tensor: Array) -> float:
    return float(np.linalg.norm(tensor))


def scale_names(layers: int) -> list[str]:
    """The tensors of the file of scales: key and value of each layer."""
    return [f"{layer}.{which}" for layer in range(layers) for which in ("key", "value")]


def read_scales(path: Path, layers: Sequence[LayerGeometry]) -> CacheScales:
    """Read the file of scales. Raises FormatError where it is damaged, or not for these layers."""
    shapes = [(layer.kv_heads, 1, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
    try:
        with path.open("rb") as file, np.load(file) as found:
            tensors = tuple(found[name] for name in scale_names(len(layers)) if name in found)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise FormatError(path, expected="a file of scales", found="a damaged one", next_step="export again") from error
    sound = all(each.dtype == np.float32 and np.isfinite(each).all() and (each > 0).all() for each in tensors)
    if not sound or [each.shape for each in tensors] != shapes:
        raise FormatError(path, expected=f"scales of {len(layers)} layers", found="others", next_step="export again")
    return CacheScales(tensors)
