"""Every model that reads, with every kind of injection, through the exporter; writes READERS.md.

pytest -m matrix tests/export
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from tests.encoders import CONFIGS, TEXT
from tests.exported_readers import exported_reader

TABLE = Path(__file__).parent / "READERS.md"
TOLERANCE = 1e-4
EFFECT = 0.1
HEADER = """# onnxruntime against PyTorch, every model that reads

Written by `pytest -m matrix tests/export`: tiny random models (2 layers, weights times 8), float32, CPU. Ragged batches
padded on the right, rows with the file's injections, with another prefix and with none; final states and logits of each
row against itself alone, without padding, by the backbone with what the file injects as it is stored: not folded.
Effect: the largest that it changes.

| model | injects | max abs d | effect | nodes | seconds to trace |
|---|---|---|---|---|---|
"""
ON_TEXT = ["kv, head first", "prompt prepend, head last", "prompt slots, add slots", "replace, delta, head mean"]
ON_IMAGES = [
    *("kv, head first", "prompt after_first, head first"),
    *("add after_first, head mean", "replace, delta, head last"),
]
OTHERWISE = {
    # Its token vectors are narrower than its states.
    "electra": ["kv, head first", "add after_first, head last", "replace, delta, head mean"],
    # Its keys are rotated by position, which rows that begin anew in every layer have not.
    "modernbert": [*ON_TEXT[:3], "kv, delta, head mean"],
    "gpt2": ["kv, head last", "prompt slots, head last", "prompt prepend, delta, head mean"],
    "llama": ["kv, head last", "prompt slots, head last", "prompt prepend, delta, head mean"],
}
CELLS = [
    (family, kinds)
    for family in (*CONFIGS, "gpt2", "llama")
    for kinds in OTHERWISE.get(family, ON_TEXT if family in TEXT else ON_IMAGES)
]


@pytest.fixture(scope="module")
def rows() -> Iterator[list[str]]:
    """The table's rows; it is written when all cells were measured."""
    measured: list[str] = []
    yield measured
    if len(measured) == len(CELLS):
        TABLE.write_text(HEADER + "".join(measured))


@pytest.mark.matrix
@pytest.mark.parametrize(("family", "kinds"), CELLS)
def test_everything_that_reads_exports_and_agrees(family: str, kinds: str, rows: list[str]) -> None:
    done = exported_reader(family, kinds)
    for case in done.cases:
        assert case.max_abs_difference <= TOLERANCE, case
    effect = max(case.effect or 0.0 for case in done.cases)
    assert effect > EFFECT
    nodes = len(onnx.load(done.folder / "onnx" / "model.onnx", load_external_data=False).graph.node)
    seconds = done.seconds["tracing"]
    rows.append(f"| {family} | {kinds} | {done.max_abs_difference:.1e} | {effect:.2f} | {nodes} | {seconds:.1f} |\n")
