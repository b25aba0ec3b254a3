"""Records as JSON Lines, one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write `records` to `path`, whole or not at all. Raises InputError where that cannot be done."""
    from prefixkit.format.atomic import write_bytes

    write_bytes(path, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode())
