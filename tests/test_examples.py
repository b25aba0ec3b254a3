"""Every example runs, offline and quickly; the longest ones with `pytest -m matrix`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "examples").glob("*.py"))
# What has no main is what others import.
SHORT = {"few_shot_templates": ["2", "2"], "five_prefixes": ["8"], "methods_side_by_side": ["2", "4"]}
"""What makes a run short, where that is more than two steps."""
LONG = (
    *("encoder_decoder_prefixes", "few_shot_templates", "pretrain_encoder", "pretrain_vit"),
    *("tagging_with_prefixes", "visual_prompts"),
)
EXAMPLES = [path for path in FILES if "__main__" in path.read_text(encoding="utf-8")]


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=[pytest.mark.matrix] * (path.stem in LONG)) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(example), *SHORT.get(example.stem, ["2"])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
