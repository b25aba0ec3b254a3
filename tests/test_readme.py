"""The README stays true: the gate runs its test command, and what it links to exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_gate_runs_the_test_command() -> None:
    command = re.search(r"## Test it\n\n```bash\n(.+?)```", README, re.DOTALL)
    assert command is not None
    gate = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in command[1].splitlines() if line not in gate] == []


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert re.findall(r"PLACEHOLDER|_TABLE|TODO", README + (ROOT / "tests" / "bench" / "README.md").read_text()) == []
