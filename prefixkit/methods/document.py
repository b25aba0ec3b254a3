"""A text that a prefix stands for, and how much of one a backbone can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefixkit.errors import ConfigError


def read_document(path: str | Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: no such file, nothing in it, or another encoding than UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
        raise ConfigError(path, expected="a text file", found=found, next_step="check the path") from error
    return document_text(data, path)


def document_text(data: bytes, where: str | Path) -> str:
    """The text that `data` holds, the same whether its lines end as on Windows or not, with a byte order mark or none.

    Raises:
        ConfigError: no text, or another encoding than UTF-8; placed at `where`.
    """
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        found, step = f"byte 0x{data[error.start]:02x} at {error.start}", "save it as text in UTF-8"
        raise ConfigError(where, expected="a text in UTF-8", found=found, next_step=step) from error
    if not text.strip():
        raise ConfigError(where, expected="some text", found="none", next_step="write the text into it")
    return text


def refuse_overlong(path: str | Path, tokens: Sequence[int], limit: int | None) -> None:
    """Raise ConfigError for a document that leaves a backbone, which reads `limit` tokens, no room for text."""
    if limit is not None and len(tokens) >= limit:
        expected, found = f"a text of fewer than {limit} tokens, which the backbone can read", f"{len(tokens)}"
        raise ConfigError(path, expected=expected, found=found, next_step="shorten it, or split it")
