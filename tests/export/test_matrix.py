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
from tests.encoder_decoders import CONFIGS as PAIRS
from tests.exported import exported, exported_pair

TABLE = Path(__file__).parent / "PARITY.md"
TOLERANCE = 1e-4
EFFECT = 0.1
HEADER = """# onnxruntime against PyTorch, every architecture

Written by `pytest -m matrix tests/export`: tiny random models (2 layers, weights times 3), float32, CPU. Ragged batches
padded on the left, rows with the prefix, with another and without, fed in one go and then token by token; each row
against itself alone, without padding, in the unmodified model. Effect: the least that the prefix changes in a case.
Encoder-decoders have two graphs, and prefixes in three places: all of them, and each place alone.

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
    if list(measured) == [*CONFIGS, *PAIRS]:
        TABLE.write_text(HEADER + "".join(measured.values()))


def nodes(done: Exported) -> int:
    """How many operators all graphs of a folder have together."""
    files = (done.folder / "onnx").glob("*.onnx")
    return sum(len(onnx.load(file, load_external_data=False).graph.node) for file in files)


@pytest.mark.matrix
@pytest.mark.parametrize("family", CONFIGS)
def test_architecture_exports_and_agrees(family: str, rows: dict[str, str]) -> None:
    beside, baked = exported(family), exported(family, baked=True)
    least = min(effect(beside), effect(baked))
    rows[family] = (
        f"| {family} | {worst(beside):.1e} | {worst(baked):.1e} | {least:.2f} "
        f"| {nodes(beside)} | {beside.seconds['tracing']:.1f} |\n"
    )


@pytest.mark.matrix
@pytest.mark.parametrize("family", PAIRS)
def test_encoder_decoder_exports_and_agrees(family: str, rows: dict[str, str]) -> None:
    done = exported_pair(family)
    rows[family] = (
        f"| {family} | {worst(done):.1e} | not offered | {effect(done):.2f} "
        f"| {nodes(done)} | {done.seconds['tracing']:.1f} |\n"
    )
