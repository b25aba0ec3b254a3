"""Finding NaN and Infinity in a tensor's bytes with the standard library, at the speed of memory."""

from __future__ import annotations

from collections.abc import Callable


def _marking(matches: Callable[[int], bool]) -> bytes:
    return bytes(matches(byte) for byte in range(256))


# NaN and Infinity have every bit of the exponent set. By dtype: how many bytes a number has and, for each of its bytes
# that holds exponent bits, where it lies and which of its values have them all set.
_ALL_SEVEN_BITS = _marking(lambda byte: byte & 0x7F == 0x7F)
_TOP_BIT = _marking(lambda byte: byte & 0x80 == 0x80)
_EXPONENT = {
    "F16": (2, ((1, _marking(lambda byte: byte & 0x7C == 0x7C)),)),
    "BF16": (2, ((1, _ALL_SEVEN_BITS), (0, _TOP_BIT))),
    "F32": (4, ((3, _ALL_SEVEN_BITS), (2, _TOP_BIT))),
}


def all_finite(data: bytes, dtype: str) -> bool:
    """Whether no number in the little-endian `data` of a float `dtype` (F16, BF16, F32) is NaN or infinite."""
    width, places = _EXPONENT[dtype]
    marks = -1
    for place, marking in places:
        # One byte a number, 1 where it is suspect: as large integers they are intersected in one go.
        marks &= int.from_bytes(data[place::width].translate(marking), "little")
        if marks == 0:
            break
    return marks == 0
