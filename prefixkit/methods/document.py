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
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(path, expected="a text file", found="no such file", next_step="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise ConfigError(path, expected="a text file in UTF-8", found=found) from error
    if not text.strip():
        raise ConfigError(path, expected="some text", found="none", next_step="write the text into it")
    return text


def refuse_overlong(path: str | Path, tokens: Sequence[int], limit: int | None) -> None:
    """Raise ConfigError for a document that leaves a backbone, which reads `limit` tokens, no room for text."""
    if limit is not None and len(tokens) >= limit:
        expected, found = f"a text of fewer than {limit} tokens, which the backbone can read", f"{len(tokens)}"
        raise ConfigError(path, expected=expected, found=found, next_step="shorten it, or split it")
