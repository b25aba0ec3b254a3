"""Keys and values in another type of number, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import ml_dtypes
import numpy as np

from prefixkit.errors import FormatError
from prefixkit.prefix import Array

_NUMPY: Mapping[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

Pair = tuple[Array, Array]


def narrowed(pairs: Sequence[Pair], dtype: str, *, otherwise: str) -> tuple[list[Pair], tuple[str, ...]]:
    """Keys and values in `dtype` (float32, float16, bfloat16), and a sentence on what was rounded, if anything was.

    Args:
        otherwise: what to do where `dtype` does not reach the numbers.

    Raises:
        FormatError: numbers beyond what `dtype` can say.
    """
    with np.errstate(over="ignore"):
        cast = [(key.astype(_NUMPY[dtype]), value.astype(_NUMPY[dtype])) for key, value in pairs]
    arrays = list(zip(chain.from_iterable(pairs), chain.from_iterable(cast), strict=True))
    if not all(np.isfinite(after).all() for _, after in arrays):
        largest = max(float(np.abs(before.astype(np.float32)).max()) for before, _ in arrays)
        expected = f"numbers up to {float(ml_dtypes.finfo(_NUMPY[dtype]).max):g} for {dtype}"
        raise FormatError("prefix", expected=expected, found=f"{largest:g}", next_step=otherwise)
    apart = max(float(np.abs(before.astype(np.float64) - after.astype(np.float64)).max()) for before, after in arrays)
    return cast, (f"{dtype} rounds the prefix, by {apart:.1g} at most",) if apart else ()
