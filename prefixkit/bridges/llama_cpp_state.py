"""llama.cpp's file with the memory of one sequence, version 3: what `llama_state_seq_load_file` reads.

Little-endian, without padding:

    u32 magic "ggsq", u32 version, u32 tokens, i32 each token
    then a block for each cache, of the layers with full attention first, of those with a sliding window second:
        u32 streams (1), u32 cells
        each cell: i32 position, u32 sequences (1), i32 sequence (ignored when loading)
        u32 whether values are transposed (as they are without flash attention), u32 layers
        keys of each layer: i32 type, u64 bytes a row, a row [kv_heads * head_dim] for each cell
        values of each layer: the same; transposed: i32 type, u32 bytes a number, u32 width, then [width][cells]

The layout is that of llama.cpp as llama-cpp-python 0.3.36 has it; llama.cpp refuses a file of another version.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefixkit.errors import FormatError
from prefixkit.format.atomic import write_stream
from prefixkit.prefix import Array

MAGIC, VERSION = 0x67677371, 3
TYPES: Mapping[int, Any] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
"""ggml's numbers of the types that caches hold as they are; quantised ones are rotated too."""
_AGAIN = "llama_state_seq_save_file writes it"

Layer = tuple[Array, Array]
"""Rows of keys and of values, [cells, kv_heads * head_dim], as the cache orders them."""


def write_state(path: Path, tokens: Sequence[int], caches: Sequence[Sequence[Layer]], *, transposed: bool) -> None:
    """Write a sequence of which row `i` is at position `i`, one for each token; a cache may have no layers.

    Raises:
        InputError: the file cannot be written.
    """
    write_stream(path, _pieces(tokens, caches, transposed))


def read_state(path: Path) -> list[list[Layer]]:
    """The layers of each cache, rows in the order of their positions.

    Raises:
        FormatError: no such file, another version, several streams, quantised rows, rows of another size than their
            type has, positions that are not 0 to that of the last token, or a file that ends too early or too late.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise FormatError(path, expected="a sequence state of llama.cpp", found=found, next_step="check the path")
    reader = _Reader(path, path.read_bytes())
    magic, version = reader.numbers("<II")
    if (magic, version) != (MAGIC, VERSION):
        found = f"version {version}" if magic == MAGIC else "another file"
        expected = f"a sequence state of llama.cpp, version {VERSION}"
        raise FormatError(path, expected=expected, found=found, next_step=_AGAIN)
    (count,) = reader.numbers("<I")
    reader.take(4 * count)
    caches = []
    while not reader.finished:
        caches.append(_cache(reader, count))
    return caches


def _pieces(tokens: Sequence[int], caches: Sequence[Sequence[Layer]], transposed: bool) -> Iterator[bytes]:
    yield struct.pack(f"<III{len(tokens)}i", MAGIC, VERSION, len(tokens), *tokens)
    for layers in caches:
        yield struct.pack("<II", 1, len(tokens))
        yield b"".join(struct.pack("<iIi", position, 1, 0) for position in range(len(tokens)))
        yield struct.pack("<II", transposed, len(layers))
        for key, _ in layers:
            yield from _rows(key)
        for _, value in layers:
            yield from _columns(value) if transposed else _rows(value)


def _rows(rows: Array) -> Iterator[bytes]:
    yield struct.pack("<iQ", _type(rows), rows.shape[1] * rows.itemsize)
    yield np.ascontiguousarray(rows).tobytes()


def _columns(rows: Array) -> Iterator[bytes]:
    yield struct.pack("<iII", _type(rows), rows.itemsize, rows.shape[1])
    yield np.ascontiguousarray(rows.T).tobytes()


def _type(rows: Array) -> int:
    return next(number for number, dtype in TYPES.items() if rows.dtype == dtype)


class _Reader:
    """Takes a file apart from its beginning, and never reads past its end."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self._data, self._place = path, memoryview(data), 0

    @property
    def finished(self) -> bool:
        return self._place == len(self._data)

    def take(self, size: int) -> memoryview:
        """The next `size` bytes. Raises FormatError where there are fewer."""
        left = len(self._data) - self._place
        if size > left:
            expected = f"{size} more bytes from byte {self._place} on"
            raise self.refuse(expected, f"{left} (truncated?)", _AGAIN)
        self._place += size
        return self._data[self._place - size : self._place]

    def numbers(self, layout: str) -> tuple[int, ...]:
        """What `struct` makes of the next bytes."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def array(self, type_: int, rows: int, width: int) -> Array:
        """[rows, width] numbers of ggml's type."""
        return np.frombuffer(self.take(rows * width * TYPES[type_].itemsize), TYPES[type_]).reshape(rows, width)

    def refuse(self, expected: str, found: object, step: str) -> FormatError:
        return FormatError(self.path, expected=expected, found=str(found), next_step=step)


def _cache(reader: _Reader, tokens: int) -> list[Layer]:
    streams, cells = reader.numbers("<II")
    if streams != 1:
        raise reader.refuse("one stream", streams, "save it in a context with kv_unified, or of one sequence")
    if cells != tokens:
        step = "save it with the tokens that it was made of"
        raise reader.refuse(f"a cell for each of {tokens} tokens", f"{cells} cells", step)
    order = _positions(reader, cells)
    transposed, layers = reader.numbers("<II")
    keys = [_read_rows(reader, cells) for _ in range(layers)]
    values = [(_read_columns if transposed else _read_rows)(reader, cells) for _ in range(layers)]
    return [(key[order], value[order]) for key, value in zip(keys, values, strict=True)]


def _positions(reader: _Reader, cells: int) -> Array:
    """[cells]: which cell each position is in."""
    found = np.frombuffer(reader.take(12 * cells), np.dtype([("at", "<i4"), ("count", "<u4"), ("sequence", "<i4")]))
    if cells == 0 or not np.array_equal(np.sort(found["at"]), np.arange(cells)) or (found["count"] != 1).any():
        told = f"{found['at'].min()} to {found['at'].max()}" if cells else "no cells"
        raise reader.refuse(f"a cell for each position from 0 to {max(cells, 1) - 1}", told, _AGAIN)
    return np.argsort(found["at"])


def _read_rows(reader: _Reader, cells: int) -> Array:
    type_, size = reader.numbers("<iQ")
    _refuse_quantized(reader, type_)
    width, rest = divmod(size, TYPES[type_].itemsize)
    if rest:
        raise reader.refuse(f"rows of numbers of {TYPES[type_].itemsize} bytes", f"rows of {size} bytes", _AGAIN)
    return reader.array(type_, cells, width)


def _read_columns(reader: _Reader, cells: int) -> Array:
    type_, size, width = reader.numbers("<iII")
    _refuse_quantized(reader, type_)
    if size != TYPES[type_].itemsize:
        raise reader.refuse(f"numbers of {TYPES[type_].itemsize} bytes", f"numbers of {size} bytes", _AGAIN)
    return reader.array(type_, width, cells).T


def _refuse_quantized(reader: _Reader, type_: int) -> None:
    if type_ not in TYPES:
        step = "save it in a context with type_k and type_v of one of them"
        raise reader.refuse("rows in float32 or float16 (ggml's type 0 or 1)", f"type {type_}", step)
