"""The header reader against safetensors' own writer, and against files made to harm it."""

from __future__ import annotations

import os
import struct
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from prefixkit.errors import FormatError
from prefixkit.format.header import PREFIX_HEADER_LIMIT, TensorEntry, read_header, read_tensors
from tests.prefixes import GOLDEN, write_safetensors


def entry(begin: int = 0, end: int = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.int8), "none": np.zeros((0, 4))}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"über": "ja", "format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"über": "ja", "format": "pt"}
    assert {name: (e.dtype, e.shape) for name, e in header.tensors.items()} == {
        "b": ("F32", (2, 3)),
        "a": ("I8", (3,)),
        "none": ("F64", (0, 4)),
    }
    assert dict(read_tensors(tmp_path / "x.safetensors", header)) == {n: a.tobytes() for n, a in arrays.items()}


def test_a_file_without_tensors_or_metadata_is_sound(tmp_path: Path) -> None:
    header = read_header(write_safetensors(tmp_path / "x", {}))
    assert (header.tensors, header.metadata) == ({}, {})


def test_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x", {"a": entry(4, 8), "b": entry(0, 4)}, bytes(8))
    assert list(read_header(path).tensors) == ["b", "a"]
    assert read_header(path).tensors["a"] == TensorEntry("F32", (1,), 4, 8)


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = GOLDEN.read_bytes()
    for length in {*range(0, len(whole), 7), *range(0, len(whole), 64), *range(16), len(whole) - 1}:
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read_header(tmp_path / "x")


DEFECTS: dict[str, tuple[dict[str, Any] | bytes, int, str]] = {
    "no braces": (b"[]", 0, "a header that starts with"),
    "white space first": (b"  {}", 0, "a header that starts with"),
    "no JSON": (b"{nonsense}", 0, "valid JSON"),
    "two documents": (b"{} {}", 0, "valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not UTF-8"),
    "half a surrogate pair": (b'{"\\ud800": {}}', 0, "not Unicode"),
    "a tensor twice": (b'{"a": {}, "a": {}}', 0, "'a' twice"),
    "a field twice": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', 0, "'dtype' twice"),
    "NaN": (b'{"a": NaN}', 0, "NaN"),
    "an infinite number": (b'{"a": 1e999}', 0, "too large"),
    "a number without an end": (b'{"a": ' + b"9" * 9999 + b"}", 0, "valid JSON"),
    "nesting without an end": (b'{"a":' * 200_000, 0, "too deep"),
    "lists without an end": (b'{"a":' + b"[" * 200_000, 0, "too deep"),
    "metadata that is a list": ({"__metadata__": []}, 0, "strings to strings"),
    "metadata with a number": ({"__metadata__": {"a": 1}}, 0, "strings to strings"),
    "metadata with an object": ({"__metadata__": {"a": {}}}, 0, "strings to strings"),
    "a tensor that is a list": ({"a": []}, 0, "dtype, shape and data_offsets"),
    "a tensor without a shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "dtype, shape and data_offsets"),
    "a tensor with more": ({"a": {**entry(), "x": 1}}, 4, "dtype, shape and data_offsets"),
    "an unknown dtype": ({"a": entry(dtype="F31")}, 4, "a known dtype"),
    "a dtype that is a list": ({"a": entry(dtype=["F32"])}, 4, "a known dtype"),
    "a shape that is a number": ({"a": entry(shape=1)}, 4, "a shape of whole numbers"),
    "a negative size": ({"a": entry(shape=(-1,))}, 4, "a shape of whole numbers"),
    "a size with a fraction": ({"a": entry(shape=(1.0,))}, 4, "a shape of whole numbers"),
    "true for a size": ({"a": entry(shape=(True,))}, 4, "a shape of whole numbers"),
    "a size beyond 64 bits": ({"a": entry(shape=(2**70,))}, 4, "a shape of whole numbers"),
    "sizes that overflow": ({"a": entry(shape=(2**40, 2**40))}, 4, "fits in memory"),
    "sizes that overflow before a zero": ({"a": entry(0, 0, shape=(2**40, 2**40, 0))}, 0, "fits in memory"),
    "a million axes": ({"a": entry(shape=(2**62,) * 100_000)}, 4, "fits in memory"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, 4, "data_offsets"),
    "offsets in reverse": ({"a": entry(4, 0)}, 4, "data_offsets"),
    "a negative offset": ({"a": entry(-4, 0)}, 4, "data_offsets"),
    "a shape that needs more bytes": ({"a": entry(shape=(2,))}, 4, "bytes for F32"),
    "half a byte": ({"a": entry(0, 1, "F4", (1,))}, 1, "bytes for F4"),
    "a hole before the data": ({"a": entry(4, 8)}, 8, "a hole"),
    "a hole in the data": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "a hole"),
    "an overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "an overlap"),
    "the same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "an overlap"),
    "an end beyond the file": ({"a": entry(0, 4)}, 3, "truncated"),
    "bytes behind the data": ({"a": entry(0, 4)}, 5, "trailing"),
    "bytes without tensors": ({}, 1, "trailing"),
    "a line break in a name": ({"a\nb": entry()}, 4, "control characters"),
    "a zero in a name": ({"a\0b": entry()}, 4, "control characters"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named(name: str, tmp_path: Path) -> None:
    header, data, told = DEFECTS[name]
    with pytest.raises(FormatError) as caught:
        read_header(write_safetensors(tmp_path / "x", header, bytes(data)))
    assert told in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("claim", [2**30, 2**63, 2**64 - 1])
def test_a_header_of_a_gibibyte_is_refused_unread(claim: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", claim))
        file.truncate(2**30 + 8)
    with pytest.raises(FormatError, match="at most 104857600 bytes"):
        read_header(path)


BOMBS = {
    "empty lists": b'{"a":[' + b"[]," * (PREFIX_HEADER_LIMIT // 3 - 4) + b"[]]}",
    "empty objects": b'{"a":[' + b"{}," * (PREFIX_HEADER_LIMIT // 3 - 4) + b"{}]}",
    "tensors": b"{" + b",".join(b'"%d":0' % index for index in range(PREFIX_HEADER_LIMIT // 11)) + b"}",
    "short keys": b"{" + b",".join(b'"%d":""' % index for index in range(PREFIX_HEADER_LIMIT // 12)) + b"}",
    "white space": b"{" + b" " * (PREFIX_HEADER_LIMIT - 2) + b"}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_the_largest_header_is_refused(name: str, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x", BOMBS[name], b"!")
    with pytest.raises(FormatError):
        read_header(path, limit=PREFIX_HEADER_LIMIT)


def test_the_largest_header_is_judged_in_200_mib(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x", BOMBS["empty lists"], b"!")
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            read_header(path, limit=PREFIX_HEADER_LIMIT)
        # The interpreter itself takes some 30 MiB.
        assert tracemalloc.get_traced_memory()[1] < 150 * 2**20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_read_or_refused(data: bytes) -> None:
    _read_or_refuse(data)


@given(st.integers(0, len(GOLDEN.read_bytes()) - 1), st.binary(min_size=1, max_size=4))
def test_a_damaged_file_is_read_or_refused(place: int, damage: bytes) -> None:
    whole = GOLDEN.read_bytes()
    _read_or_refuse(whole[:place] + damage + whole[place + len(damage) :])


def _read_or_refuse(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(data)
        try:
            header = read_header(path)
        except FormatError:
            return
        assert sum(e.end - e.begin for e in header.tensors.values()) == len(data) - header.data_start


@pytest.mark.parametrize("made", ["nothing", "a folder", "a pipe"])
def test_no_file(made: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if made == "a folder":
        path.mkdir()
    elif made == "a pipe":
        os.mkfifo(path)
    with pytest.raises(FormatError, match="expected a safetensors file"):
        read_header(path)


def test_a_file_that_shrinks_between_header_and_data(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(GOLDEN.read_bytes())
    header = read_header(path)
    path.write_bytes(GOLDEN.read_bytes()[:-4])
    with pytest.raises(FormatError, match="shrank"):
        dict(read_tensors(path, header))
