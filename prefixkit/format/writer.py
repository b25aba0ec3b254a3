"""Writing safetensors: the same tensors and metadata give the same bytes, whatever order they come in.

The safetensors library orders metadata keys at random, and its numpy side has no bfloat16; hence our own writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prefixkit.errors import FormatError
from prefixkit.format.canonical import canonical
from prefixkit.format.header import DTYPE_BITS, PREFIX_HEADER_LIMIT


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file holds it: a safetensors dtype such as `F32`, a shape, and C-contiguous little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file, in pieces: the header, then each tensor's data.

    Data comes widest dtype first and by name, which aligns every tensor; the header is padded to a multiple of 8.

    Raises:
        FormatError: a header that readers would refuse for its size.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-DTYPE_BITS[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = canonical(header)
    text += b" " * (-len(text) % 8)
    if len(text) > PREFIX_HEADER_LIMIT:
        raise FormatError("header", expected=f"at most {PREFIX_HEADER_LIMIT} bytes", found=f"{len(text)}")
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.data
