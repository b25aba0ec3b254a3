"""Digests of large weights, remembered by path, size and times of change, so that they are hashed once.

The cache is a convenience: unreadable, damaged or unwritable, it is as if it were empty. `PREFIXKIT_CACHE` moves it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from prefixkit.errors import InputError
from prefixkit.format.atomic import write_bytes
from prefixkit.format.canonical import canonical

WORTH_REMEMBERING = 64 * 2**20
"""Bytes of weights from which on a look-up pays; less is hashed in some hundredths of a second."""
_SETTLED = 2.0
"""Seconds after which a later change is sure to have another time, whatever the file system's clock."""


def look_up(files: Sequence[Path]) -> str | None:
    """The digest remembered for `files` as they are now, or None."""
    try:
        known = _place(files).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return known if re.fullmatch(r"b3t-v1:[0-9a-f]{64}", known) else None


def remember(files: Sequence[Path], digest: str) -> None:
    """Keep `digest` for `files`, if they are large and have been at rest for a while."""
    facts = [file.stat() for file in files]
    newest = max(max(fact.st_mtime, fact.st_ctime) for fact in facts)
    if sum(fact.st_size for fact in facts) < WORTH_REMEMBERING or time.time() - newest < _SETTLED:
        return
    try:
        place = _place(files)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(place, digest.encode())
    except (OSError, InputError):
        return


def folder() -> Path:
    """Where digests are kept: `PREFIXKIT_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("PREFIXKIT_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "prefixkit" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "prefixkit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefixkit"


def _place(files: Sequence[Path]) -> Path:
    facts = []
    for file in files:
        fact = file.stat()
        facts.append([os.path.realpath(file), fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns])
    return folder() / "digests" / blake3(canonical(facts)).hexdigest()
