"""Numbers in a narrower dtype, or a refusal where it does not reach them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from prefixkit.errors import FormatError

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: Mapping[str, Any] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def rounded(array: Array, dtype: str, *, where: str, otherwise: str) -> Array:
    """`array` in one of DTYPES, each number rounded to the nearest.

    Args:
        where: what the message names.
        otherwise: what to do where `dtype` does not reach the numbers.

    Raises:
        FormatError: numbers beyond the largest of `dtype`.
    """
    with np.errstate(over="ignore"):
        made = array.astype(DTYPES[dtype])
    if not np.isfinite(made).all():
        expected = f"numbers up to {float(ml_dtypes.finfo(DTYPES[dtype]).max):g} for {dtype}"
        largest = np.abs(array.astype(np.float64)).max()
        raise FormatError(where, expected=expected, found=f"{largest:g}", next_step=otherwise)
    return made
