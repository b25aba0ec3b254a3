"""The specification's claims that can go stale: its example, its limits and the tests that it names."""

from __future__ import annotations

import re
from pathlib import Path

from prefixkit.format.canonical import canonical
from prefixkit.format.digest import leaf_line
from prefixkit.format.header import PREFIX_HEADER_LIMIT, read_tensors
from prefixkit.format.stored import read_stored
from tests.prefixes import GOLDEN

ROOT = Path(__file__).parents[2]
SPECIFICATION = (ROOT / "schemas" / "README.md").read_text(encoding="utf-8")


def test_the_worked_example_is_the_golden_file() -> None:
    stored = read_stored(GOLDEN)
    rest = {key: value for key, value in stored.original.items() if key != "content"}
    lines = [leaf_line("__metadata__", "JSON", (), (canonical(rest),))]
    for name, data in read_tensors(GOLDEN, stored.header):
        entry = stored.header.tensors[name]
        lines.append(leaf_line(name, entry.dtype, entry.shape, (data,)))
    spelled = "".join(line.decode().replace("\0", "\\0").replace("\n", "\\n\n") for line in sorted(lines))
    assert f"```\n{spelled}```\n\ngives `{stored.document['content']}`." in SPECIFICATION


def test_the_limit_is_the_one_in_force() -> None:
    assert f"at most {PREFIX_HEADER_LIMIT:,} (2 MiB)".replace(",", " ") in SPECIFICATION


def test_every_test_in_the_threat_table_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", SPECIFICATION))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named == {name for name in named if f"def {name}(" in tests}
    assert len(named) > 10
