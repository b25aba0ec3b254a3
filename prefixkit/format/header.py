"""Reading the header of a safetensors file with the standard library, trusting nothing in it.

A safetensors file is 8 bytes with the length of the header (little-endian), the header (JSON), and the data. Here the
data must be indexed from its first byte to its last without holes or overlaps, so that nothing can hide in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from prefixkit.errors import FormatError
from prefixkit.format.canonical import read_json

CHECKPOINT_HEADER_LIMIT = 100 * 2**20
"""Bytes of header in a checkpoint, at most: the limit of the safetensors library."""
PREFIX_HEADER_LIMIT = 2 * 2**20
"""Bytes of header in a prefix file, at most. JSON grows up to thirtyfold in memory."""

_DTYPES_BY_BITS = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("I16", "U16", "F16", "BF16"),
    32: ("I32", "U32", "F32"),
    64: ("I64", "U64", "F64", "C64"),
}
DTYPE_BITS: Mapping[str, int] = {dtype: bits for bits, dtypes in _DTYPES_BY_BITS.items() for dtype in dtypes}
_LARGEST_SIZE = 2**63 - 1
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `begin` and `end` count bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds. `tensors` are in the order of their data."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: str | Path, *, limit: int = CHECKPOINT_HEADER_LIMIT) -> Header:
    """The header of the safetensors file at `path`; its data is not read.

    Raises:
        FormatError: no such file, or anything in it that the specification does not allow.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(file.read(8), size, limit, path)
        text = file.read(length)
    if len(text) < length:
        raise FormatError(path, expected=f"a header of {length} bytes", found=f"{len(text)}")
    return _parse(text, size - 8 - length, path)


def read_tensors(path: str | Path, header: Header) -> Iterator[tuple[str, bytes]]:
    """Each tensor's name and little-endian bytes, in the order of the data.

    Raises:
        FormatError: the file got shorter since its header was read.
    """
    with opened(path) as file:
        for name, entry in header.tensors.items():
            file.seek(header.data_start + entry.begin)
            data = file.read(entry.end - entry.begin)
            if len(data) < entry.end - entry.begin:
                raise FormatError(path, expected=f"all of tensor {name}", found="a file that shrank meanwhile")
            yield name, data


def opened(path: str | Path) -> BinaryIO:
    """The regular file at `path`, open for reading. Raises FormatError where there is none."""
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "nothing" if not Path(path).exists() else "no regular file"
        raise FormatError(path, expected="a safetensors file", found=found, next_step="check the path")
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise FormatError(path, expected="a file that can be read", found=(error.strerror or "").lower()) from error


def _header_length(start: bytes, size: int, limit: int, path: object) -> int:
    if len(start) < 8:
        raise FormatError(path, expected="a safetensors file of 8 bytes or more", found=f"{size} bytes")
    length = int.from_bytes(start, "little")
    if length > limit:
        found = f"a claim of {length} bytes (not a safetensors file?)"
        raise FormatError(path, expected=f"a header of at most {limit} bytes", found=found)
    if length > size - 8:
        found = f"{size - 8} bytes after the length (truncated?)"
        raise FormatError(path, expected=f"a header of {length} bytes", found=found)
    return length


def _parse(text: bytes, data_size: int, path: object) -> Header:
    if not text.startswith(b"{"):
        raise FormatError(path, expected="a header that starts with '{'", found=repr(text[:1]))
    stored: dict[str, Any] = read_json(text, f"{path} header")
    metadata = _metadata(stored.pop("__metadata__", {}), path)
    entries = {name: _entry(name, entry, path) for name, entry in stored.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_layout(ordered, data_size, path)
    return Header(ordered, metadata, 8 + len(text))


def _metadata(stored: Any, path: object) -> dict[str, str]:
    if not isinstance(stored, dict) or not all(isinstance(value, str) for value in stored.values()):
        raise FormatError(path, expected="__metadata__ that maps strings to strings", found=_brief(stored))
    return stored


def _entry(name: str, stored: Any, path: object) -> TensorEntry:
    where = f"{path} tensor {name[:80]}"
    # The digest separates its fields by such characters.
    if any(character < " " for character in name):
        raise FormatError(where, expected="a name without control characters", found=_brief(name))
    if not isinstance(stored, dict) or set(stored) != _ENTRY_KEYS:
        raise FormatError(where, expected="dtype, shape and data_offsets", found=_brief(stored))
    dtype, shape, offsets = stored["dtype"], stored["shape"], stored["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(where, expected="a known dtype", found=_brief(dtype))
    if not _are_sizes(shape):
        raise FormatError(where, expected="a shape of whole numbers", found=_brief(shape))
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(where, expected="data_offsets [begin, end]", found=_brief(offsets))
    if _bits(shape, dtype, where) != 8 * (offsets[1] - offsets[0]):
        expected = f"bytes for {dtype} {_brief(shape)}"
        raise FormatError(where, expected=expected, found=f"{offsets[1] - offsets[0]} bytes")
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(stored: Any) -> bool:
    # True and False are integers to Python, but not to JSON.
    return isinstance(stored, list) and all(type(size) is int and 0 <= size <= _LARGEST_SIZE for size in stored)


def _bits(shape: list[int], dtype: str, where: str) -> int:
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits > _LARGEST_SIZE:
            raise FormatError(where, expected="a tensor that fits in memory", found=f"shape {_brief(shape)}")
    return bits


def _check_layout(tensors: Mapping[str, TensorEntry], data_size: int, path: object) -> None:
    ends = [0, *(entry.end for entry in tensors.values())]
    for (name, entry), end in zip(tensors.items(), ends, strict=False):
        if entry.begin != end:
            what = "a hole" if entry.begin > end else "an overlap"
            expected = f"data_offsets that begin at {end}"
            raise FormatError(f"{path} tensor {name[:80]}", expected=expected, found=f"{entry.begin}, {what}")
    if ends[-1] != data_size:
        more = "more (trailing bytes)" if data_size > ends[-1] else "fewer (truncated?)"
        raise FormatError(path, expected=f"{ends[-1]} bytes of data", found=f"{data_size}, {more}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
