"""Arrays as safetensors files of other runtimes keep them: which dtypes, and the bytes there and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from prefixkit.errors import InputError
from prefixkit.format.writer import StoredTensor
from prefixkit.prefix import Array

DTYPES: Mapping[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""By the name that safetensors has for it, each dtype that a prefix may have."""


def stored_tensor(array: Array, shape: tuple[int, ...] | None = None) -> StoredTensor:
    """`array` as a file keeps it: in its own shape, or in another of as many numbers.

    Raises:
        InputError: another dtype.
    """
    for name, dtype in DTYPES.items():
        if array.dtype == dtype:
            return StoredTensor(name, array.shape if shape is None else shape, np.ascontiguousarray(array).tobytes())
    raise InputError("tensor to export", expected="float32, float16 or bfloat16", found=str(array.dtype))
