"""A prefix in another dtype."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prefixkit.algebra.derived import Derived, derived
from prefixkit.errors import ConfigError
from prefixkit.prefix import Array, Prefix
from prefixkit.rounding import DTYPES, rounded


def cast(prefix: Prefix, dtype: str) -> Derived:
    """Every tensor of `prefix` as `dtype`, each number rounded to the nearest. A prefix that is so stays itself.

    Raises:
        ConfigError: another dtype than float16, bfloat16 or float32.
        FormatError: a number too large for it.
    """
    if dtype not in DTYPES:
        raise ConfigError("cast: dtype", expected=", ".join(DTYPES), found=repr(dtype)[:80])
    if all(array.dtype == DTYPES[dtype] for array in prefix.tensors.values()):
        return Derived(prefix, (f"all of it is {dtype} already; nothing changed",))
    step = "use bfloat16, whose range is float32's" if dtype == "float16" else "keep it in float32"
    tensors = {
        name: rounded(array, dtype, where=f"cast: {name}", otherwise=step) for name, array in prefix.tensors.items()
    }
    operation = {"operation": "cast", "dtype": dtype}
    manifest = prefix.manifest
    notes = (_told(prefix.tensors, tensors),)
    return derived([prefix], operation, manifest.injections, tensors, task=manifest.task, notes=notes)


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
