"""How far the tensors of two prefixes are apart, beside what `prefixkit.prefix.compare` says of their manifests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prefixkit.prefix import Array, Prefix


@dataclass(frozen=True)
class Apart:
    """Two tensors of one name and shape.

    Attributes:
        max, mean: of the absolute differences.
        cosine: of the angle between them as vectors; None where one of them is all zeros.
    """

    name: str
    max: float
    mean: float
    cosine: float | None


def apart(ours: Prefix, theirs: Prefix) -> Iterator[Apart]:
    """Each tensor that both have in one shape and that differs, by name; measured in float64, whatever the dtypes."""
    for name in sorted(ours.tensors.keys() & theirs.tensors.keys()):
        left, right = ours.tensors[name], theirs.tensors[name]
        if left.shape == right.shape and (left.dtype != right.dtype or left.tobytes() != right.tobytes()):
            yield _measured(name, left.astype(np.float64), right.astype(np.float64))


def _measured(name: str, left: Array, right: Array) -> Apart:
    off = np.abs(left - right)
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    cosine = float((left * right).sum() / norms) if norms else None
    return Apart(name, float(off.max()), float(off.mean()), cosine)
