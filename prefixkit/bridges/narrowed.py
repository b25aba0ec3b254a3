"""Keys and values in another type of number, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from prefixkit.prefix import Array
from prefixkit.rounding import rounded

Pair = tuple[Array, Array]


def narrowed(pairs: Sequence[Pair], dtype: str, *, otherwise: str) -> tuple[list[Pair], tuple[str, ...]]:
    """Keys and values in `dtype` (float32, float16, bfloat16), and a sentence on what was rounded, if anything was.

    Args:
        otherwise: what to do where `dtype` does not reach the numbers.

    Raises:
        FormatError: numbers beyond what `dtype` can say.
    """
    before = list(chain.from_iterable(pairs))
    after = [rounded(array, dtype, where="prefix", otherwise=otherwise) for array in before]
    apart = max(float(np.abs(_wide(ours) - _wide(theirs)).max()) for ours, theirs in zip(before, after, strict=True))
    cast = list(zip(after[::2], after[1::2], strict=True))
    return cast, (f"{dtype} rounds the prefix, by {apart:.1g} at most",) if apart else ()


def _wide(array: Array) -> Array:
    return array.astype(np.float64)
