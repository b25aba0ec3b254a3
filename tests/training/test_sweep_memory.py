"""What a sweep says it will need is what its largest pass needs, whatever its trials are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.training import loop, memory, side_by_side, sweep_memory
from prefixkit.training.grid import configs
from prefixkit.training.sweep import Quiet, _begin
from prefixkit.training.trials import Trial
from tests.training.live import Live
from tests.training.test_memory import ERRORS, Hears, failing
from tests.training.test_sweep import given

Folder = Callable[..., Path]
TOLERANCE = 0.25
SEEDS: dict[str, list[Any]] = {"seed": [0, 1, 2]}


def begun(
    folder: Path, tmp_path: Path, rows: int, grid: Mapping[str, list[Any]], *, words: int = 12, **changes: Any
) -> list[Trial]:
    """Trials whose batches are of texts of one length, but one."""
    data = tmp_path / "data.jsonl"
    lines = [("river", "mill"), *[("river " * words, "mill " * (words // 2))] * (3 * rows - 1)]
    data.write_text("\n".join(json.dumps({"input": text, "target": target}) for text, target in lines))
    asked = given(folder, data, batch_size=rows, **changes) | {"eval_data": str(data)}
    return _begin(configs(asked, grid, tmp_path), grid, Quiet())


def measured(found: list[Trial]) -> int:
    """The most bytes beside the weights in two steps of all, the second with the optimizers' state."""
    backbone = found[0].prepared.backbone
    backbone.shares_beginnings = False
    methods = [weight for trial in found for weight in trial.prepared.method.parameters()]
    with Live([*backbone.model.parameters(), *backbone.model.buffers(), *methods]) as live:
        for _ in range(2):
            if together := [trial for trial in found if trial.shares]:
                side_by_side.step(together)
            for trial in found:
                if not trial.shares:
                    loop.advance(trial.prepared, trial.optimizer, trial.state)
    return live.peak + sum(weight.nbytes for weight in methods)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "rows", "words", "method"),
    [
        ("gpt2", 2, 12, {"length": 4}),
        ("gpt2", 8, 2, {"length": 100}),
        ("gpt2", 1, 2, {"length": 100}),
        ("llama", 16, 12, {"length": 40}),
        ("gpt2", 8, 12, {"name": "prompt-tuning", "length": 8}),
        ("gpt2", 2, 2, {"length": 100, "reparameterization": "mlp", "bottleneck": 256}),
    ],
)
def test_trials_side_by_side_need_what_is_estimated(
    backbone_folder: Folder,
    tmp_path: Path,
    family: str,
    rows: int,
    words: int,
    method: dict[str, Any],
    checkpointing: bool,
) -> None:
    how = {"method": method, "gradient_checkpointing": checkpointing, "words": words}
    found = begun(backbone_folder(family), tmp_path, rows, SEEDS, **how)
    needs = sweep_memory.estimate(found)
    assert (needs.rows, needs.trials) == (3 * rows, 3)
    assert f"for {3 * rows} rows of 3 trials, beside" in needs.told()
    assert abs((needs.needed - needs.laid_out) / measured(found) - 1) <= TOLERANCE
    assert needs.needed > 1.5 * memory.estimate(found[0].prepared).needed


def test_a_pass_has_no_more_rows_than_its_tokens_allow(
    backbone_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = begun(backbone_folder("gpt2"), tmp_path, 16, SEEDS)
    longest = max(map(len, found[0].prepared.batches.examples))
    monkeypatch.setitem(side_by_side.MOST, "cpu", 10 * longest)
    needs = sweep_memory.estimate(found)
    assert needs.rows == 10
    assert abs((needs.needed - needs.laid_out) / measured(found) - 1) <= TOLERANCE


def test_of_trials_one_after_the_other_the_largest_counts(backbone_folder: Folder, tmp_path: Path) -> None:
    found = begun(backbone_folder("falcon"), tmp_path, 8, {"batch_size": [2, 8, 4]})
    assert not any(trial.shares for trial in found)
    needs = sweep_memory.estimate(found)
    assert (needs.rows, needs.trials) == (8, 1)
    assert abs((needs.needed - needs.laid_out) / measured(found) - 1) <= TOLERANCE


def test_an_estimate_of_a_sweep_changes_nothing(backbone_folder: Folder, tmp_path: Path) -> None:
    losses = []
    for asks in (True, False):
        found = begun(backbone_folder("gpt2"), tmp_path, 4, SEEDS)
        if asks:
            sweep_memory.estimate(found)
        assert all(weight.grad is None for trial in found for weight in trial.prepared.method.parameters())
        torch.manual_seed(0)
        losses.append([step.loss for _ in range(3) for step in side_by_side.step(found)])
    assert losses[0] == losses[1]


def test_advice_counts_the_rows_of_each_trial(backbone_folder: Folder, tmp_path: Path) -> None:
    needs = sweep_memory.estimate(begun(backbone_folder("gpt2"), tmp_path, 8, SEEDS))
    assert needs.advice() == "use --batch-size 4 or --gradient-checkpointing"


def test_where_nothing_can_be_measured_the_sweep_is_tried_all_the_same(
    backbone_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, heard = begun(backbone_folder("gpt2"), tmp_path, 8, SEEDS), Hears()
    monkeypatch.setattr(memory, "kept", failing(memory.kept, ERRORS[0], 1))
    assert memory.tell(lambda: sweep_memory.estimate(found), heard) is None
    assert heard.messages == ["memory: too little to measure what a step will need"]
