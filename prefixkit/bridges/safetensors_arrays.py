"""Arrays as safetensors files of other runtimes keep them."""

from __future__ import annotations

import numpy as np

from prefixkit.errors import InputError
from prefixkit.format.writer import StoredTensor
from prefixkit.prefix import DTYPES, Array


def stored_tensor(array: Array, shape: tuple[int, ...] | None = None) -> StoredTensor:
    """`array` as a file keeps it: in its own shape, or in another of as many numbers.

    Raises:
        InputError: another dtype.
    """
    for name, dtype in DTYPES.items():
        if array.dtype == dtype:
            return StoredTensor(name, array.shape if shape is None else shape, np.ascontiguousarray(array).tobytes())
    raise InputError("tensor to export", expected="float32, float16 or bfloat16", found=str(array.dtype))
