"""A prefix in another dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from prefixkit.algebra.derived import Derived, derived
from prefixkit.errors import ConfigError
from prefixkit.prefix import Array, Prefix

DTYPES: Mapping[str, Any] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def cast(prefix: Prefix, dtype: str) -> Derived:
    """Every tensor of `prefix` as `dtype`, each number rounded to the nearest. A prefix that is so stays itself.

    Raises:
        ConfigError: another dtype than float16, bfloat16 or float32; a number too large for it.
    """
    if dtype not in DTYPES:
        raise ConfigError("cast: dtype", expected=", ".join(DTYPES), found=repr(dtype)[:80])
    if all(array.dtype == DTYPES[dtype] for array in prefix.tensors.values()):
        return Derived(prefix, (f"all of it is {dtype} already; nothing changed",))
    tensors = {name: _rounded(name, array, dtype) for name, array in prefix.tensors.items()}
    operation = {"operation": "cast", "dtype": dtype}
    manifest = prefix.manifest
    made = derived([prefix], operation, manifest.injections, tensors, task=manifest.task)
    return Derived(made, (_told(prefix.tensors, tensors),))


def _rounded(name: str, array: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        rounded = array.astype(DTYPES[dtype])
    if not np.isfinite(rounded.astype(np.float32)).all():
        largest = np.abs(array.astype(np.float64)).max()
        most = float(ml_dtypes.finfo(DTYPES[dtype]).max)
        step = "use bfloat16, whose range is float32's" if dtype == "float16" else "keep it in float32"
        where, expected = f"cast: {name}", f"numbers within {most:g}, the largest of {dtype}"
        raise ConfigError(where, expected=expected, found=f"{largest:g}", next_step=step)
    return rounded


def _told(before: Mapping[str, Array], after: Mapping[str, Array]) -> str:
    """What rounding did."""
    moved, lost = 0.0, 0
    for name, array in before.items():
        exact, rounded = array.astype(np.float64), after[name].astype(np.float64)
        moved = max(moved, float(np.abs(exact - rounded).max()))
        lost += int(((rounded == 0) & (exact != 0)).sum())
    if not moved:
        return "no number changed"
    zeros = f"; {lost:,} too small for it became 0" if lost else ""
    return f"numbers moved by at most {moved:.3g} in rounding{zeros}"
