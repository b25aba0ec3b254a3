"""JSON as this format writes it, one spelling for each document, and as it reads it, without the loose ends.

Canonical: UTF-8, keys sorted by code point, no white space, non-ASCII characters as themselves, numbers as Python's
`repr` gives them (integers in digits, others as the shortest decimal that reads back the same), no NaN or Infinity.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from blake3 import blake3

from prefixkit.errors import FormatError

HASH_TAG = "b3-v1:"


def canonical(document: Any, where: object = "document") -> bytes:
    """The canonical JSON of `document`. Raises FormatError for NaN, Infinity, and text that is not Unicode."""
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
        return text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(where, expected="what JSON can hold", found=_reason(error)) from error


def canonical_hash(document: Any, where: object = "document") -> str:
    """`b3-v1:` and the BLAKE3 of the canonical JSON of `document`."""
    return tagged(canonical(document, where))


def tagged(data: bytes) -> str:
    """`b3-v1:` and the BLAKE3 of `data`."""
    return HASH_TAG + blake3(data).hexdigest()


def read_json(data: bytes, where: object) -> Any:
    """The document that `data` spells, strictly.

    Raises:
        FormatError: not UTF-8, not JSON, a key twice in one object, NaN or Infinity, numbers without an end, nesting
            without an end, half of a surrogate pair.
    """
    try:
        document = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(where, expected="valid JSON in UTF-8", found=_reason(error)) from error
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} twice")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which JSON does not have")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:80]}, which is too large")
    return number


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nesting that is too deep"
    if isinstance(error, UnicodeError):
        return "text that is not Unicode" if isinstance(error, UnicodeEncodeError) else "bytes that are not UTF-8"
    return str(error)[:200]
