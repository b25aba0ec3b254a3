"""Every method on every family of backbone, from training to a served graph; writes METHODS.md.

pytest -m matrix tests/matrix
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.injections import injection
from prefixkit.methods.catalogue import METHODS
from prefixkit.prefix import load
from tests.matrix.families import FAMILIES, Cell, cell_of

TABLE = Path(__file__).parent / "METHODS.md"
TOLERANCE = 1e-4
EFFECT = 1e-3
HEADER = """# Every method on every family

Written by `pytest -m matrix tests/matrix`: tiny random models (2 layers), float32, CPU. Each cell was trained for ten
steps, saved, loaded, inspected against its backbone, folded, evaluated, exported to ONNX and compared with PyTorch in
onnxruntime: the number is the largest difference of any output. [N] is a refusal, in sentence N below.

"""
Out = pytest.CaptureFixture[str]


class Table:
    """What was found in each cell, and the refusals in order."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], str] = {}
        self.refusals: list[str] = []

    def number(self, sentence: str) -> str:
        """The number of a refusal."""
        if sentence not in self.refusals:
            self.refusals.append(sentence)
        return f"[{1 + self.refusals.index(sentence)}]"

    def rendered(self) -> str:
        """The table in Markdown."""
        lines = [f"| method | {' | '.join(FAMILIES)} |", "|---" * (1 + len(FAMILIES)) + "|"]
        for method in METHODS:
            row = " | ".join(self.cells[method, family] for family in FAMILIES)
            lines.append(f"| {method} | {row} |")
        told = [f"{number}. {sentence}" for number, sentence in enumerate(self.refusals, 1)]
        return HEADER + "\n".join([*lines, "", *told]) + "\n"


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """The table, which is written when every cell was tried."""
    found = Table()
    yield found
    if len(found.cells) == len(METHODS) * len(FAMILIES):
        TABLE.write_text(found.rendered())


def refusal(capfd: Out) -> str:
    """The one line that a refusal is, without the paths and names of one cell and what to do instead."""
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("prefixkit: ")]
    plain = re.sub(r"\S*/(\S+)", r"\1", line.removeprefix("prefixkit: "))
    plain = re.sub(r"; use --method [a-z0-9-]+( or [a-z0-9-]+)*$", "", plain)
    plain = re.sub(r"^--method [a-z0-9-]+", "--method METHOD", plain)
    return re.sub(rf"\b({'|'.join(FAMILIES)})(?=[:,])", "FAMILY", plain)


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_family(method: str, family: str, table: Table, tmp_path: Path, capfd: Out) -> None:
    cell = cell_of(method, family, tmp_path)
    if run(cell.train) != 0:
        table.cells[method, family] = table.number(refusal(capfd))
        assert FAMILIES[family].kind not in METHODS[method].backbones or cell.refused
        return
    difference = checked(cell, capfd)
    table.cells[method, family] = f"{difference:.0e}" if difference is not None else table.number(refusal(capfd))


def checked(cell: Cell, capfd: Out) -> float | None:
    """Inspect, fold, evaluate and export the trained file; the largest difference, or None for a refused export."""
    prefix = load(cell.output)
    backbone = load_backbone(cell.folder)
    folded = backbone.fold(injection(prefix))
    assert folded.arrays()
    assert run(["inspect", str(cell.output), "--backbone", str(cell.folder)]) == 0
    assert re.search(r"fits backbone\s+yes", capfd.readouterr().out)
    assert run([*cell.evaluate, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["metrics"]["loss"] > 0
    exported = cell.output.with_suffix(".onnx")
    if run(["export", "--onnx", str(cell.output), "--backbone", str(cell.folder), "-o", str(exported)]) != 0:
        assert not exported.exists()
        return None
    report = json.loads((exported / "export.json").read_text())
    difference = max(case["max_abs_difference"] for case in report["parity"])
    assert difference <= TOLERANCE
    assert max(case["effect"] or 0.0 for case in report["parity"]) > EFFECT
    return float(difference)
