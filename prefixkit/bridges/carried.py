"""What came of carrying a prefix into another runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A prefix in another runtime's form.

    Attributes:
        output: the file or folder that was written.
        next: the one line that a user runs or writes next.
        lost: what the runtime cannot hold, a sentence each.
    """

    output: Path
    next: str
    lost: tuple[str, ...] = ()
