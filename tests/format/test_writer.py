"""The writer: the same bytes whatever order things come in, and files that safetensors itself opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prefixkit.errors import FormatError
from prefixkit.format.header import read_header, read_tensors
from prefixkit.format.writer import StoredTensor, encode

TENSORS = {
    "b": StoredTensor("F16", (3,), np.array([1, 2, 3], "<f2").tobytes()),
    "a": StoredTensor("BF16", (1, 1), b"\x80\x3f"),
    "z": StoredTensor("F32", (2,), np.array([0.5, -1.5], "<f4").tobytes()),
    "empty": StoredTensor("F32", (0, 2), b""),
}
METADATA = {"format": "pt", "prefixkit": "{}", "ä": "é"}


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(encode(TENSORS, METADATA)))
    loaded = load_file(path)
    assert loaded["z"].tolist() == [0.5, -1.5]
    assert loaded["b"].tolist() == [1.0, 2.0, 3.0]
    assert (loaded["a"].dtype, loaded["a"].tolist()) == (torch.bfloat16, [[1.0]])
    assert loaded["empty"].shape == (0, 2)


def test_so_do_we(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(encode(TENSORS, METADATA)))
    header = read_header(path)
    assert header.metadata == METADATA
    assert dict(read_tensors(path, header)) == {name: tensor.data for name, tensor in TENSORS.items()}


def test_order_does_not_matter() -> None:
    shuffled = dict(reversed(TENSORS.items())), dict(reversed(METADATA.items()))
    assert b"".join(encode(*shuffled)) == b"".join(encode(TENSORS, METADATA))


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(encode(TENSORS, METADATA)))
    header = read_header(path)
    assert header.data_start % 8 == 0
    widths = {"F32": 4, "F16": 2, "BF16": 2}
    assert all(entry.begin % widths[entry.dtype] == 0 for entry in header.tensors.values())


def test_no_header_that_readers_would_refuse() -> None:
    with pytest.raises(FormatError, match="header: expected at most"):
        list(encode(TENSORS, {"prefixkit": "x" * 2**21}))
