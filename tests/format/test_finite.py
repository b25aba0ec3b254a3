"""NaN and Infinity found in bytes, as numpy finds them in arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prefixkit.format.finite import all_finite

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_number_of_16_bits(dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    told = [all_finite(number.tobytes(), dtype) for number in every]
    assert told == np.isfinite(every.astype(np.float32)).tolist()


def test_the_upper_half_of_every_float32() -> None:
    every = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    assert [all_finite(number.tobytes(), "F32") for number in every] == np.isfinite(every).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_among_many(dtype: str, number: float, place: int) -> None:
    array: Any = np.linspace(-6e4, 6e4, 1000).astype(DTYPES[dtype])
    assert all_finite(array.tobytes(), dtype)
    array[place] = number
    assert not all_finite(array.tobytes(), dtype)


def test_the_exponents_halves_in_two_numbers_are_no_infinity() -> None:
    # 0x7f00 has the upper seven bits of the exponent, 0x0080 the lowest.
    array = np.array([0x7F00, 0x0080], np.uint16).view(ml_dtypes.bfloat16)
    assert all_finite(array.tobytes(), "BF16")


def test_nothing_is_finite() -> None:
    assert all_finite(b"", "F32")
