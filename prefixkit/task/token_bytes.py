"""How much text a token can stand for: what tells, before it is tokenised, that a text has too many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_COMPOSED = 4
"""How many times shorter NFC makes a text at most: by 3.5 with Unicode 14, U+1FBE U+0308 U+0341 to U+0390."""
_LOSSLESS = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split")


def most_bytes(backend: Tokenizer) -> int | None:
    """Bytes of UTF-8 that one token stands for, at most; None where there is no such limit, or none that is known.

    It is known of BPE over bytes, or with bytes to fall back on. Others let one token stand for a whole unknown word,
    or drop white space.
    """
    stored = json.loads(backend.to_str())
    vocabulary = stored["model"].get("vocab")
    splits = list(_parts(stored["pre_tokenizer"], "pretokenizers"))
    byte_level = any(split["type"] == "ByteLevel" for split in splits)
    single = ByteLevel.alphabet() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    falls_back = byte_level or stored["model"].get("byte_fallback")
    if stored["model"].get("type") != "BPE" or not falls_back or not all(byte in vocabulary for byte in single):
        return None
    if any(split["type"] not in _LOSSLESS or split.get("behavior") == "Removed" for split in splits):
        return None
    shorter = [_shorter(step) for step in _parts(stored["normalizer"], "normalizers")]
    if None in shorter or any(token["lstrip"] or token["rstrip"] for token in stored["added_tokens"]):
        return None
    added = max((len(token["content"].encode()) for token in stored["added_tokens"]), default=0)
    # Each character of a byte-level token is a byte.
    longest = max(len(token if byte_level else token.encode()) for token in vocabulary)
    return max(longest, added) * (_COMPOSED if _COMPOSED in shorter else 1)


def _parts(step: Mapping[str, Any] | None, several: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence, which may hold sequences."""
    if step is not None and step["type"] == "Sequence":
        for part in step[several]:
            yield from _parts(part, several)
    elif step is not None:
        yield step


def _shorter(step: Mapping[str, Any]) -> int | None:
    """How many times shorter a normalizer makes a text, at most; None where that is not known."""
    if step["type"] == "Replace":
        replaced = step["pattern"].get("String")
        return 1 if replaced is not None and len(replaced.encode()) <= len(step["content"].encode()) else None
    return {"NFC": _COMPOSED, "Prepend": 1}.get(step["type"])
