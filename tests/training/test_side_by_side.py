"""Several runs in the same passes: each as if it were alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.backbones.load import load_backbone
from prefixkit.training import loop, side_by_side
from prefixkit.training.checkpoint import State
from prefixkit.training.preparation import prepare
from tests.encoders import encoder_folder
from tests.training.test_answer_commands import TASKS
from tests.training.test_loop import settings

Folder = Callable[..., Path]
RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"seed": 1, "batch_size": 5},
    {"method": {"length": 7}, "optimizer": {"lr": 0.03, "loss": "sum"}},
    {"method": {"name": "prompt-tuning", "length": 3}},
    {"method": {"length": 4, "reparameterization": "mlp", "bottleneck": 16}, "optimizer": {"lr": 0.01}},
    {"method": {"length": 4, "positions": "none"}, "optimizer": {"lr": 0.1, "warmup_steps": 2}},
)


def runs(folder: Path, records: Path, tmp_path: Path, *, layout: str = "auto") -> list[side_by_side.Run]:
    dtype = torch.float64
    backbone = load_backbone(str(folder))
    backbone.model.to(dtype)
    made = []
    for number, changes in enumerate(RUNS):
        prepared = prepare(settings(folder, records, tmp_path / f"{number}", layout=layout, **changes), backbone)
        prepared.method.to(dtype)
        prepared.batches.order = "length"
        made.append(side_by_side.Run(prepared, loop.make_optimizer(prepared), State()))
    return made


def parameters(run: side_by_side.Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.prepared.method.parameters()]


@pytest.mark.parametrize(
    ("family", "layout"),
    # Llama's norms work in float32, and round a sum of gradients otherwise than its parts.
    [*((family, layout) for family in ("gpt2", "llama") for layout in ("padded", "packed")), ("gpt2", "auto")],
)
def test_gradients_equal_those_of_separate_runs(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layout: str
) -> None:
    together = runs(backbone_folder(family), records, tmp_path, layout=layout)
    apart = runs(backbone_folder(family), records, tmp_path, layout="padded")
    found, expected = [], []
    keep: list[Any] = []
    monkeypatch.setattr(loop, "update", lambda prepared, optimizer, number: keep.append(_gradients(prepared)))
    monkeypatch.setattr(side_by_side, "PASS", 8)
    monkeypatch.setattr(side_by_side, "MOST", {"cpu": 512})
    told = side_by_side.step(together)
    found, keep[:] = list(keep), []
    for run, step in zip(apart, told, strict=True):
        batch = run.prepared.batches.batch(0)
        loss = loop.step(run.prepared, run.optimizer, batch, 0)
        assert step.loss == pytest.approx(loss, rel=1e-10)
        assert step.tokens == batch.tokens
    expected = keep
    assert len(found) == len(expected) == len(RUNS)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).abs().max() <= 1e-10
        assert max(one.abs().max() for one in theirs) > 1e-4


def _gradients(prepared: Any) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in prepared.method.parameters()]


def test_steps_equal_those_of_separate_runs(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    together, apart = (runs(backbone_folder("gpt2"), records, tmp_path) for _ in range(2))
    start = [parameters(run) for run in apart]
    for number in range(4):
        side_by_side.step(together)
        for run in apart:
            loop.set_rates(run.optimizer, loop.schedule(number, run.prepared))
            loop.step(run.prepared, run.optimizer, run.prepared.batches.batch(number), number)
    for one, other, before in zip(together, apart, start, strict=True):
        assert one.state.step == 4
        for ours, theirs, begin in zip(parameters(one), parameters(other), before, strict=True):
            assert (ours - theirs).abs().max() <= 1e-8
            assert begin.numel() == 1 or (ours - begin).abs().max() > 1e-3


def test_gradients_of_several_passes_gather_in_memory_of_their_own(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the first pass may be a CUDA graph's, and gone with the second."""
    places: list[list[int]] = []
    made, backward = side_by_side._leaf, side_by_side._backward

    def leaf(one: Any) -> Any:
        leaves.append(made(one))
        return leaves[-1]

    def noted(*given: Any) -> torch.Tensor:
        places.append([tensor.grad.data_ptr() for one in leaves for tensor in one.tensors])
        return backward(*given)

    leaves: list[Any] = []
    monkeypatch.setattr(side_by_side, "_leaf", leaf)
    monkeypatch.setattr(side_by_side, "_backward", noted)
    monkeypatch.setattr(side_by_side, "MOST", {"cpu": 64})
    side_by_side.step(runs(backbone_folder("gpt2"), records, tmp_path, layout="packed"))
    places.append([tensor.grad.data_ptr() for one in leaves for tensor in one.tensors])
    assert len(places) > 3
    assert all(each == places[0] for each in places)


def test_rows_of_like_length_stand_together_and_none_is_lost() -> None:
    rows = [(index % 3, "x" * length) for index, length in enumerate([5, 40, 6, 41, 7] * 8)]
    groups = list(side_by_side.alike(rows, 10**6))
    assert sorted(row for group in groups for row in group) == sorted(rows)
    assert [(len(group[0][1]), len(group[-1][1])) for group in groups] == [(5, 7), (40, 41)]


def test_packed_rows_stay_in_turn() -> None:
    rows = [(index // 4, "x" * length) for index, length in enumerate([5, 40, 6, 41, 100, 1, 7, 20])]
    groups = list(side_by_side.in_turn(rows, 90))
    assert [row for group in groups for row in group] == rows
    assert [sum(len(example) for _, example in group) for group in groups] == [51, 41, 100, 28]


def test_a_pass_has_an_end() -> None:
    rows = [(0, "x" * 100)] * 7 + [(1, "x" * 500)]
    assert [len(group) for group in side_by_side.alike(rows, 300)] == [3, 3, 1, 1]


def test_nothing_is_collated_but_what_is_read(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, made = runs(backbone_folder("gpt2"), records, tmp_path), []
    batches = together[0].prepared.batches
    collate = batches.collate
    monkeypatch.setattr(batches, "collate", lambda rows: made.append(len(rows)) or collate(rows))
    side_by_side.step(together)
    assert sum(made) == sum(len(run.prepared.batches.indices(0)) for run in together)


HEADS: tuple[dict[str, Any], ...] = (
    {"task": "tagging"},
    {"task": "classification", "batch_size": 5},
    {"task": "tagging", "seed": 1, "optimizer": {"lr": 0.03, "loss": "sum"}},
    {"task": "classification", "method": {"name": "p-tuning-v2", "length": 6}},
    {
        "task": "tagging",
        "method": {"name": "p-tuning-v2", "length": 3, "reparameterization": "mlp", "bottleneck": 16},
        "optimizer": {"lr": 0.01},
    },
)


def answered(folder: Path, tmp_path: Path, layout: str) -> list[side_by_side.Run]:
    """Runs of two tasks with heads, in turn, in float64."""
    backbone, made = load_backbone(str(folder)), []
    backbone.model.double()
    for number, changes in enumerate(HEADS):
        data = tmp_path / f"{changes['task']}.jsonl"
        data.write_text("".join(json.dumps(TASKS[changes["task"]][0](index)) + "\n" for index in range(24)))
        given = {"eval_data": None, "method": {"name": "p-tuning-v2", "length": 4}, "layout": layout, **changes}
        prepared = prepare(settings(folder, data, tmp_path / f"{number}", **given), backbone)
        assert side_by_side.can_share(prepared)
        prepared.method.double()
        prepared.batches.order = "length"
        made.append(side_by_side.Run(prepared, loop.make_optimizer(prepared), State()))
    return made


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_heads_side_by_side_equal_separate_runs(
    backbone_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layout: str
) -> None:
    # Heads answer in float32, which would round float64 away.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    folder = backbone_folder("gpt2") if family == "gpt2" else encoder_folder("bert", tmp_path / "bert")
    together, apart = answered(folder, tmp_path, layout), answered(folder, tmp_path, "padded")
    keep: list[Any] = []
    monkeypatch.setattr(
        loop, "update", lambda prepared, optimizer, number: keep.append((prepared, _gradients(prepared)))
    )
    monkeypatch.setattr(side_by_side, "MOST", {"cpu": 64})
    for run, step in zip(apart, side_by_side.step(together), strict=True):
        batch = run.prepared.batches.batch(0)
        loss = loop.step(run.prepared, run.optimizer, batch, 0)
        assert step.loss == pytest.approx(loss, rel=1e-10)
        assert step.tokens == batch.tokens
    ours = [next(found for one, found in keep if one is run.prepared) for run in together]
    theirs = [next(found for one, found in keep if one is run.prepared) for run in apart]
    for found, expected in zip(ours, theirs, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= 1e-10
        assert max(one.abs().max() for one in expected) > 1e-4


@pytest.mark.parametrize("task", ["multiple-choice", "question-answering"])
def test_other_answers_are_computed_alone(backbone_folder: Folder, tmp_path: Path, task: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(TASKS[task][0](index)) + "\n" for index in range(8)))
    changes = {"eval_data": None, "task": task, "method": {"name": "p-tuning-v2", "length": 4}}
    prepared = prepare(settings(backbone_folder("gpt2"), data, tmp_path / "p", **changes))
    assert not side_by_side.can_share(prepared)
