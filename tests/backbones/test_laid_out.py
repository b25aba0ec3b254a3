"""Weights in oneDNN's own order: products stay what they are, what changed is laid out anew, and memory has an end."""

from __future__ import annotations

import os
import pickle
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prefixkit.backbones import laid_out, onednn
from prefixkit.backbones.laid_out import LaidOut, give_back, ordered, size
from tests.training.every_kind import prepared

pytestmark = pytest.mark.skipif(not onednn.works(), reason="no processor with x86's instructions, or no oneDNN")
ROWS = 256
of_linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


def multiplied(weight: Tensor, turned: bool, laid: LaidOut | None) -> list[Tensor]:
    states = torch.linspace(-1, 1, ROWS * weight.shape[0 if turned else 1]).view(ROWS, -1).requires_grad_()
    found = onednn.multiplied(states, weight, None, turned=turned, laid_out=laid)
    return [found.detach(), *torch.autograd.grad(found.square().sum(), states)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max())) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("turned", [False, True])
def test_products_and_gradients_are_those_of_the_weight(turned: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    found = multiplied(weight, turned, LaidOut())
    assert same(found, multiplied(weight, turned, None))
    assert not same(found, multiplied(weight.flip(0), turned, None))


@pytest.mark.parametrize("exchange", [False, True])
def test_what_changed_is_laid_out_anew(exchange: bool) -> None:
    torch.manual_seed(0)
    weight, laid = torch.randn(24, 24), LaidOut()
    before = multiplied(weight, False, laid)
    if exchange:
        weight.data = -weight
    else:
        weight.neg_()
    found = multiplied(weight, False, laid)
    assert same(found, multiplied(weight, False, None))
    assert not same(found, before)


def test_another_weight_at_the_same_address_is_laid_out_anew() -> None:
    """As when a model goes to another dtype and back: what it had is free by then."""
    place = np.ones((24, 24), dtype=np.float32)
    weight, laid = torch.from_numpy(place), LaidOut()
    before = multiplied(weight, False, laid)
    place[:] = -1
    weight.data = torch.from_numpy(place)
    found = multiplied(weight, False, laid)
    assert same(found, multiplied(weight, False, None))
    assert not same(found, before)


def test_each_order_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(laid_out, "ordered", lambda weight: made.append(tuple(weight.shape)) or ordered(weight))
    weight, laid = torch.randn(24, 40), LaidOut()
    for _ in range(3):
        multiplied(weight, False, laid)
    assert made == [(24, 40), (40, 24)]


@pytest.mark.parametrize("copied", [deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_begin_without(copied: object) -> None:
    weight, laid = torch.randn(24, 24), LaidOut()
    multiplied(weight, False, laid)
    copy = copied(laid)  # type: ignore[operator]
    weight.data.neg_()  # which torch does not see
    assert same(multiplied(weight, False, copy), multiplied(weight, False, None))


def test_weights_of_a_run_are_laid_out_up_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))).requires_grad_(False)
    one = size(model[0].weight)  # type: ignore[arg-type]
    monkeypatch.setattr(onednn, "MOST", 2 * one + one // 2)
    onednn.multiply_by_onednn(model)  # type: ignore[arg-type]
    assert [layer.laid_out is not None for layer in model] == [True, True, False, False]
    assert onednn.laid_out_bytes(model) == 2 * one
    onednn.multiply_by_torch(model)  # type: ignore[arg-type]
    assert onednn.laid_out_bytes(model) == 0
    assert not any("laid_out" in layer.__dict__ for layer in model)


def test_a_run_that_begins_lays_out_what_is_there_now(tmp_path: Path) -> None:
    """What is written through `data` between runs is not seen by torch."""
    run = prepared("prefix-tuning", "gpt2", tmp_path)
    weight = run.backbone.model.transformer.h[0].mlp.c_fc.weight
    states = torch.randn(ROWS, weight.shape[0])
    layer = run.backbone.model.transformer.h[0].mlp.c_fc
    before = layer(states)
    weight.data.neg_()
    onednn.multiply_by_onednn(run.backbone.model)
    assert same([layer(states) - layer.bias], [layer.bias - before])


def test_what_stands_in_the_place_of_a_weight_is_not_laid_out() -> None:
    model = nn.Sequential(nn.Linear(24, 24, bias=False)).requires_grad_(False)
    onednn.multiply_by_onednn(model)  # type: ignore[arg-type]
    states, other = torch.randn(ROWS, 24), torch.randn(24, 24)
    model(states)
    model[0].__dict__["weight"] = other
    assert same([model(states)], [states @ other.T])
    assert model[0].laid_out.operand(model[0]._parameters["weight"], False) is not None


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    """16 MiB of a file."""
    path = tmp_path / "weight"
    torch.arange(1 << 22, dtype=torch.float32).numpy().tofile(path)
    return torch.from_file(str(path), shared=False, size=1 << 22)


@of_linux
def test_a_weight_that_was_given_back_is_read_again(mapped: Tensor) -> None:
    expected, resident = mapped.sum(), _resident()
    give_back(mapped.view(2, -1).T)
    assert _resident() > resident - (1 << 20)
    give_back(mapped)
    assert _resident() < resident - 15 * (1 << 20)
    assert mapped.sum() == expected


@of_linux
def test_what_was_written_is_not_given_back(mapped: Tensor) -> None:
    mapped[1 << 21] = -1
    written, made = mapped.clone(), torch.arange(1 << 22, dtype=torch.float32)
    for weight in (mapped, made, torch.ones(3)):
        give_back(weight)
    assert torch.equal(mapped, written)
    assert torch.equal(made, torch.arange(1 << 22, dtype=torch.float32))


@of_linux
def test_where_nothing_is_said_of_pages_nothing_is_given_back(mapped: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> bytes:
        raise OSError

    mapped.sum()
    resident = _resident()
    monkeypatch.setattr(os, "pread", refused)
    give_back(mapped)
    assert _resident() > resident - (1 << 20)


@of_linux
def test_where_all_pages_are_said_to_be_untouched_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a sandbox may say that stands in for Linux."""
    made = torch.arange(1 << 22, dtype=torch.float32)
    monkeypatch.setattr(os, "pread", lambda file, count, place: bytes(count))
    give_back(made)
    assert torch.equal(made, torch.arange(1 << 22, dtype=torch.float32))


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
