"""Migrations: applied in order, from where a document stands."""

from __future__ import annotations

from typing import Any

import pytest

from prefixkit.format.manifest import SCHEMA_VERSION
from prefixkit.format.migrate import MIGRATIONS, migrate


def to_two(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "steps": [2]}


def to_three(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "steps": [*document["steps"], 3]}


def test_there_is_one_for_every_old_version() -> None:
    assert len(MIGRATIONS) == SCHEMA_VERSION - 1


@pytest.mark.parametrize(("version", "steps"), [(1, [2, 3]), (2, ["own", 3])])
def test_each_version_takes_the_steps_it_lacks(version: int, steps: list[Any]) -> None:
    old = {"schema": version, "steps": ["own"]}
    assert migrate(old, migrations=(to_two, to_three), newest=3) == {"schema": 3, "steps": steps}
    assert old == {"schema": version, "steps": ["own"]}


@pytest.mark.parametrize("version", [3, 4, 0, -1, "1", 1.0, True, None])
def test_other_versions_are_left_for_the_validator(version: Any) -> None:
    assert migrate({"schema": version}, migrations=(to_two, to_three), newest=3) == {"schema": version}
