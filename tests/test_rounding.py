"""Narrower numbers: rounded to the nearest, or refused where they do not reach."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from prefixkit.errors import FormatError
from prefixkit.rounding import DTYPES, rounded


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_fits_and_more_is_refused(dtype: str) -> None:
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    made = rounded(np.array([-largest, 0.1]), dtype, where="x", otherwise="y")
    assert (made.dtype, float(made[0])) == (DTYPES[dtype], -largest)
    assert abs(float(made[1]) - 0.1) < 1e-3
    with pytest.raises(FormatError) as caught:
        rounded(np.array([1.0, -1.1 * largest]), dtype, where="x", otherwise="y")
    assert str(caught.value) == f"x: expected numbers up to {largest:g} for {dtype}; found {1.1 * largest:g}; y"
