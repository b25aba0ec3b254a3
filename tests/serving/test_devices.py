"""Where a folder runs, by what there are kernels for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixkit.errors import ConfigError
from prefixkit.serving import buffered_runtime
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.buffers import Buffers
from prefixkit.serving.graph import Device, Graph
from prefixkit.serving.report import ExportedFolder, read_report
from prefixkit.serving.session import Session
from tests.exported import exported


@pytest.fixture
def report() -> ExportedFolder:
    return read_report(exported("gpt2", target="cuda").folder)


@pytest.fixture
def asked(report: ExportedFolder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What devices graphs are loaded for, behind the export; they run on the CPU."""
    found: list[str] = []

    def load(path: Path, device: Device, *given: Any, **options: Any) -> Graph:
        found.append(device)
        return Graph(path, "cpu", *given, **options)

    monkeypatch.setattr(buffered_runtime, "Graph", load)
    return found


def test_float32_over_buffers_runs_on_the_cpu(report: ExportedFolder, asked: list[str]) -> None:
    runtime = BufferedRuntime(report, device="auto", threads=1)
    runtime.recorded(2, 8)
    assert asked == ["cpu", "cpu"]
    BufferedRuntime(replace(report, dtype="float16"), device="auto", threads=1)
    assert asked[2:] == ["auto"]


def test_float32_over_buffers_is_refused_on_a_gpu(report: ExportedFolder) -> None:
    with pytest.raises(ConfigError, match=r"expected float16 or bfloat16 on a GPU; found float32; export .* --dtype"):
        Session(report.folder, device="cuda", threads=1)


def test_nothing_is_sent_to_make_room(report: ExportedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = BufferedRuntime(report, device="cpu", threads=1).rows(2, 16)
    monkeypatch.delattr(Graph, "on_device")
    rows.read(0, [[5, 6, 7], [8]])
    rows.read(0, [[5], [8]])


def test_the_same_rows_are_bound_once(report: ExportedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, texts = BufferedRuntime(report, device="cpu", threads=1), [[[5, 6, 7], [8]], [[9, 5, 6, 7, 11], [8, 12]]]
    expected = [runtime.rows(2, 16).read(0, text).logits for text in texts]
    rows, bound, bind = runtime.rows(3, 16), [], Buffers.bind
    monkeypatch.setattr(Buffers, "bind", lambda self, *place: (bound.append(place[1:]), bind(self, *place)))
    for _ in range(2):
        for text, logits in zip(texts, expected, strict=True):
            for row in (0, 1):
                rows.begin(row, None)
            assert (rows.read(0, text).logits == logits).all()
    assert bound == [(0, 2)]
    rows.read(1, [[5, 6], [7]])
    rows.read(0, [[5, 6], [7]])
    rows.read(0, [[5, 6]])
    assert bound == [(0, 2), (1, 3), (0, 2), (0, 1)]
