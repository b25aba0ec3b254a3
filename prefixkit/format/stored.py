"""A prefix file as it is stored: its header, its manifest and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.errors import FormatError
from prefixkit.format.canonical import read_json
from prefixkit.format.checks import Problem
from prefixkit.format.consistency import tensor_problems
from prefixkit.format.digest import content_digest, leaf_line
from prefixkit.format.finite import all_finite
from prefixkit.format.header import PREFIX_HEADER_LIMIT, Header, read_header
from prefixkit.format.migrate import migrate
from prefixkit.format.validate import problems

KEY = "prefixkit"
"""The metadata key that holds the manifest."""


@dataclass(frozen=True)
class StoredPrefix:
    """A file whose header was read and judged.

    Attributes:
        document: the manifest as the newest schema has it.
        original: the manifest as it is stored, which the content digest covers.
        problems: what is wrong with manifest and header; the data was not looked at.
    """

    path: Path
    header: Header
    document: dict[str, Any]
    original: dict[str, Any]
    problems: tuple[Problem, ...]


def read_stored(path: str | Path) -> StoredPrefix:
    """Read and judge the header of the prefix file at `path`.

    Raises:
        FormatError: no such file, a damaged one, or one without a manifest.
    """
    header = read_header(path, limit=PREFIX_HEADER_LIMIT)
    original = _manifest(path, header.metadata)
    document = migrate(original)
    found = problems(document) or tensor_problems(document, header.tensors)
    return StoredPrefix(Path(path), header, document, original, tuple(found))


def _manifest(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        step = "train one with `prefixkit train`, or bring one over with `prefixkit import`"
        found = "other safetensors"
        raise FormatError(path, expected=f"a prefix file (metadata key {KEY!r})", found=found, next_step=step)
    others = {key: value for key, value in metadata.items() if key != KEY}
    if others != {"format": "pt"}:
        # The digest covers no other metadata.
        told = ", ".join(f"{key[:40]!r}: {value[:40]!r}" for key, value in list(others.items())[:3])
        raise FormatError(path, expected=f"the metadata format: 'pt' and {KEY} alone", found=told or f"{KEY} alone")
    manifest = read_json(metadata[KEY].encode(), f"{path} metadata {KEY}")
    if not isinstance(manifest, dict):
        raise FormatError(path, expected="a manifest, which is a JSON object", found=f"a {type(manifest).__name__}")
    return manifest


def data_problems(stored: StoredPrefix, tensors: Iterable[tuple[str, bytes]]) -> list[Problem]:
    """What is wrong with the data of a file without other problems: numbers that are none, a digest that differs."""
    found, lines = [], []
    for name, data in tensors:
        entry = stored.header.tensors[name]
        if not all_finite(data, entry.dtype):
            found.append(Problem("/injections", f"expected finite numbers in {name}; found NaN or Infinity"))
        lines.append(leaf_line(name, entry.dtype, entry.shape, (data,)))
    found += digest_problems(stored.original, lines)
    return found


def digest_problems(document: Mapping[str, Any], lines: Iterable[bytes]) -> list[Problem]:
    """The one problem of a content digest that is not that of the content."""
    digest = content_digest(lines, document)
    if digest == document["content"]:
        return []
    return [
        Problem(
            "/content", f"expected {digest}, the digest of the content; found {document['content']} (damaged or edited)"
        )
    ]


def refuse(path: str | Path, found: Sequence[Problem], *, next_step: str = "") -> None:
    """Raise FormatError if there are problems: the first one, how many more, and where to see them all."""
    if len(found) > 1:
        step = next_step or f"`prefixkit inspect {path}` lists them"
        raise FormatError(f"{path} {found[0]} (and {len(found) - 1} more)", next_step=step)
    if found:
        raise FormatError(f"{path} {found[0]}", next_step=next_step)
