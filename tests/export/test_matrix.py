"""Every architecture through the exporter, with the prefix beside the graph and inside it; writes PARITY.md.

pytest -m matrix tests/export
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from prefixkit.export.onnx import Exported
from tests.architectures import CONFIGS
from tests.exported import exported

TABLE = Path(__file__).parent / "PARITY.md"
TOLERANCE = 1e-4
EFFECT = 0.1
HEADER = """# onnxruntime against PyTorch, every architecture

Written by `pytest -m matrix tests/export`: tiny random models (2 layers, weights times 3), float32, CPU. Ragged batches
padded on the left, rows with the prefix, with another and without, fed in one go and then token by token; each row
against itself alone, without padding, in the unmodified model. Effect: the least that the prefix changes in a case.

| architecture | max abs d | baked: max abs d | effect of the prefix | nodes | seconds to trace |
|---|---|---|---|---|---|
"""


def worst(done: Exported) -> float:
    """The largest difference, after every bar was met."""
    for case in done.cases:
        assert case.max_abs_difference <= TOLERANCE, case
        assert case.effect is None or case.effect > EFFECT, case
    return done.max_abs_difference


def effect(done: Exported) -> float:
    """The least effect of the prefix in any case that has one."""
    return min(case.effect for case in done.cases if case.effect is not None)


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, str]]:
    """Table rows by architecture; the table is written when all of them were measured."""
    measured: dict[str, str] = {}
    yield measured
    if list(measured) == list(CONFIGS):
        TABLE.write_text(HEADER + "".join(measured.values()))


@pytest.mark.matrix
@pytest.mark.parametrize("family", CONFIGS)
def test_architecture_exports_and_agrees(family: str, rows: dict[str, str]) -> None:
    beside, baked = exported(family), exported(family, baked=True)
    graph = onnx.load(beside.folder / "onnx" / "model.onnx", load_external_data=False).graph
    least = min(effect(beside), effect(baked))
    rows[family] = (
        f"| {family} | {worst(beside):.1e} | {worst(baked):.1e} | {least:.2f} "
        f"| {len(graph.node)} | {beside.seconds['tracing']:.1f} |\n"
    )
