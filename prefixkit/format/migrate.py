"""Old manifests become new ones, a version at a time.

`MIGRATIONS[n]` turns a document of schema n + 1 into one of schema n + 2. The list only ever grows at its end, and no
entry is edited after a release: files out there depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prefixkit.format.manifest import SCHEMA_VERSION

Migration = Callable[[dict[str, Any]], dict[str, Any]]

MIGRATIONS: tuple[Migration, ...] = ()


def migrate(
    document: dict[str, Any], *, migrations: Sequence[Migration] = MIGRATIONS, newest: int = SCHEMA_VERSION
) -> dict[str, Any]:
    """`document` as the newest schema has it. A version that is unknown here is left for `validate` to refuse."""
    version = document.get("schema")
    if type(version) is not int or not 1 <= version < newest:
        return document
    for step, migration in enumerate(migrations[version - 1 :], start=version):
        document = {**migration(document), "schema": step + 1}
    return document
