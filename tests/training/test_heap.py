"""The heap is trimmed before a batch that is larger than all before it, and at no other time."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from prefixkit.training.heap import Heap, trimmer


def test_room_is_made_for_the_largest() -> None:
    calls: list[int] = []
    heap = Heap(lambda: calls.append(1))
    counts = []
    for tokens in (10, 5, 10, 11, 3, 20, 20):
        heap.make_room(tokens)
        counts.append(len(calls))
    assert counts == [1, 1, 1, 2, 2, 3, 3]


def test_nothing_happens_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trimmer(torch.device("cuda")) is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert trimmer(torch.device("cpu")) is None
    Heap(None).make_room(5)


@pytest.mark.skipif(sys.platform != "linux", reason="the heap of another system")
def test_a_c_library_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trimmer(torch.device("cpu"))
    assert found is None or found() in (0, 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert trimmer(torch.device("cpu")) is None
