"""The files of an exported graph: size and digest, so that one that was cut or exchanged is named as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from prefixkit.errors import FormatError

SMALL = 64 * 2**20
"""Bytes up to which a file's digest is compared when it is loaded; of a larger one only the size is."""
_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class GraphFile:
    """A file as it was exported.

    Attributes:
        file: its path, relative to the exported folder.
        bytes: its size.
        digest: `b3-v1:` and the BLAKE3 of its bytes.
    """

    file: str
    bytes: int
    digest: str


def listed(folder: Path, graph: Path) -> tuple[GraphFile, ...]:
    """What is beside `graph` and itself, for the report in `folder`."""
    files = sorted(path for path in graph.parent.iterdir() if path.is_file())
    return tuple(GraphFile(path.relative_to(folder).as_posix(), path.stat().st_size, _digest(path)) for path in files)


def check_files(folder: Path, files: Sequence[GraphFile]) -> None:
    """Raise FormatError for a file that is missing or not the exported one; see `SMALL`."""
    for file in files:
        path = folder / file.file
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            raise _other(path, f"{file.bytes:,} bytes", "no such file" if size is None else f"{size:,}")
        if size <= SMALL and _digest(path) != file.digest:
            raise _other(path, "the exported file", "another of the same size")


def _digest(path: Path) -> str:
    whole = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            whole.update(piece)
    return f"b3-v1:{whole.hexdigest()}"


def _other(path: Path, expected: str, found: str) -> FormatError:
    return FormatError(path, expected=expected, found=found, next_step="export again, or copy the folder again")
