"""Sweeps: each trial as a run of its own, halving, Ctrl-C and going on, and the table of results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from prefixkit.errors import ConfigError
from prefixkit.prefix import load
from prefixkit.training import loop, study
from prefixkit.training.grid import axes, points
from prefixkit.training.sweep import BEST, Quiet, rungs, sweep
from prefixkit.training.trials import RESULTS, Trial, best_of
from tests.training.test_loop import settings

Folder = Callable[..., Path]
GRID: dict[str, list[Any]] = {"optimizer.lr": [0.03, 0.1], "seed": [0, 1]}


class Presses(Quiet):
    """Presses Ctrl-C after a number of steps, and keeps what it hears."""

    def __init__(self, step: int = -1) -> None:
        self.at, self.messages, self.sizes = step, [], []

    def on_trials(self, trials: Sequence[Trial], tokens: int) -> None:
        self.sizes.append([len(trial.prepared.batches.indices(trial.state.step - 1)) for trial in trials])
        if max(trial.state.step for trial in trials) == self.at:
            raise KeyboardInterrupt

    def on_message(self, message: str) -> None:
        self.messages.append(message)


def given(folder: Path, records: Path, **changes: Any) -> dict[str, Any]:
    made = asdict(settings(folder, records, "unused", **changes))
    return {key: value for key, value in made.items() if value is not None and key != "output"}


@pytest.fixture
def asked(backbone_folder: Folder, records: Path) -> dict[str, Any]:
    return given(backbone_folder("gpt2"), records)


def test_a_grid_is_every_combination() -> None:
    grid = axes(["optimizer.lr=0.03,0.1", 'method.init=["text:a, b", "random"]'])
    assert points(grid) == [
        {"optimizer.lr": 0.03, "method.init": "text:a, b"},
        {"optimizer.lr": 0.03, "method.init": "random"},
        {"optimizer.lr": 0.1, "method.init": "text:a, b"},
        {"optimizer.lr": 0.1, "method.init": "random"},
    ]


@pytest.mark.parametrize("text", ["", "seed", "seed=", "=3", "seed=[]", "backbone=a,b", "output=x"])
def test_a_grid_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--grid: expected"):
        axes([text])


@pytest.mark.parametrize("values", ["0,0", "0.1,1e-1", "1,true", "[[1, 2], [1, 2.0]]"])
def test_a_value_is_tried_once(asked: dict[str, Any], tmp_path: Path, values: str) -> None:
    grid = axes(["optimizer.lr=0.03,0.1", f"seed={values}"])
    for work in (sweep, lambda *given: study.work(*given, f"sqlite:///{tmp_path / 'study.db'}")):
        with pytest.raises(ConfigError, match=r"--grid: expected values of seed that differ; found .* and "):
            work(asked, grid, tmp_path / "out")
    assert not list(tmp_path.glob("out*")) + list(tmp_path.glob("*.db"))


def test_every_trial_is_a_run_of_its_own(asked: dict[str, Any], tmp_path: Path) -> None:
    found = sweep(asked, GRID, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / RESULTS).read_text())
    losses = []
    for trial, record in zip(found, stored["trials"], strict=True):
        own = {**trial.prepared.config.__dict__, "output": str(tmp_path / f"{trial.number}")}
        loop.train(type(trial.prepared.config)(**own))
        alone = load(tmp_path / f"{trial.number}")
        swept = load(trial.prepared.config.output)
        assert swept.manifest.provenance.config == alone.manifest.provenance.config
        for name, tensor in alone.tensors.items():
            assert abs(swept.tensors[name] - tensor).max() <= 1e-4
        wanted = alone.manifest.provenance.metrics["validation_loss"]
        assert record["validation_loss"] == pytest.approx(wanted, rel=1e-4)
        assert record["settings"] == {"optimizer.lr": [0.03, 0.1][trial.number // 2], "seed": trial.number % 2}
        losses.append(wanted)
    assert len(set(losses)) == len(GRID["optimizer.lr"]) * len(GRID["seed"])
    assert stored["best"] == losses.index(min(losses))
    assert load(tmp_path / "out" / BEST).manifest.content == load(stored_path(tmp_path, stored)).manifest.content


def stored_path(tmp_path: Path, stored: dict[str, Any]) -> Path:
    return tmp_path / "out" / str(stored["trials"][stored["best"]]["output"])


def test_one_that_was_stopped_goes_on_to_the_same_bytes(asked: dict[str, Any], tmp_path: Path) -> None:
    whole = sweep(asked, GRID, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, GRID, tmp_path / "parts", listener=Presses(7))
    assert not (tmp_path / "parts" / BEST).exists()
    resumed = sweep(asked, GRID, tmp_path / "parts", resume=True)
    for one, other in zip(whole, resumed, strict=True):
        first, second = (Path(trial.prepared.config.output) for trial in (one, other))
        assert first.read_bytes() == second.read_bytes()
    again = sweep(asked, GRID, tmp_path / "parts", resume=True)
    assert [trial.score for trial in again] == [trial.score for trial in whole]
    assert not list((tmp_path / "parts").glob("*.checkpoint"))


def test_halving_drops_the_worse_and_gives_the_better_their_rows(asked: dict[str, Any], tmp_path: Path) -> None:
    grid = {"optimizer.lr": [1e-6, 0.1, 1e-5, 0.03]}
    heard = Presses()
    found = sweep({**asked, "batch_size": 4}, grid, tmp_path / "out", halving=True, listener=heard)
    assert rungs(4, 12) == [4, 8]
    assert [trial.status for trial in found] == ["dropped", "finished", "dropped", "dropped"]
    assert sorted(trial.state.step for trial in found) == [4, 4, 8, 12]
    assert [max(sizes[1] for sizes in heard.sizes[begin : begin + 4]) for begin in (0, 4, 8)] == [4, 8, 16]
    best = best_of(found)
    assert best is not None
    assert best.number == 1
    with pytest.raises(KeyboardInterrupt):
        sweep({**asked, "batch_size": 4}, grid, tmp_path / "parts", halving=True, listener=Presses(6))
    again = sweep({**asked, "batch_size": 4}, grid, tmp_path / "parts", halving=True, resume=True)
    assert [trial.status for trial in again] == [trial.status for trial in found]
    assert (tmp_path / "parts" / BEST).read_bytes() == (tmp_path / "out" / BEST).read_bytes()


def test_trials_of_other_methods_are_computed_by_themselves(asked: dict[str, Any], tmp_path: Path) -> None:
    heard = Presses()
    grid = {"method": [{"name": "prefix-tuning", "length": 3}, {"name": "bitfit"}]}
    found = sweep(asked, grid, tmp_path / "out", listener=heard)
    assert [trial.shares for trial in found] == [True, False]
    assert all(trial.status == "finished" and trial.state.best_loss < math.inf for trial in found)
    assert any("trials 1: computed one after the other" in message for message in heard.messages)


def test_a_trial_that_diverges_stops_alone(asked: dict[str, Any], tmp_path: Path) -> None:
    class Breaks(Presses):
        def on_trials(self, trials: Sequence[Trial], tokens: int) -> None:
            if trials[0].state.step == 5:
                next(trials[0].prepared.method.parameters()).data.fill_(math.nan)

    heard = Breaks()
    found = sweep(asked, {"seed": [0, 1]}, tmp_path / "out", listener=heard)
    assert [trial.status for trial in found] == ["diverged", "finished"]
    assert any(message.startswith("trial 0 diverged: training: expected a finite loss") for message in heard.messages)
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["best"] == 1


def test_what_cannot_be_swept_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--eval-data: expected examples by which the best run is told"):
        sweep({key: value for key, value in asked.items() if key != "eval_data"}, GRID, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"--halving: expected trials of equally many steps.*\[12, 20\]"):
        sweep(asked, {"steps": [12, 20]}, tmp_path / "b", halving=True)
    with pytest.raises(ConfigError, match="expected a sweep to resume; found none"):
        sweep(asked, GRID, tmp_path / "c", resume=True)
    assert not any((tmp_path / name).exists() for name in "abc")
    sweep({**asked, "steps": 1}, {"seed": [0]}, tmp_path / "d")
    with pytest.raises(ConfigError, match="expected a new folder; found an earlier sweep"):
        sweep(asked, GRID, tmp_path / "d")
    with pytest.raises(ConfigError, match="expected the grid"):
        sweep(asked, GRID, tmp_path / "d", resume=True)


TRIAL = {"settings": {"seed": 0}, "status": "finished", "steps": 1, "best_step": 1, "doublings": 0}


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ([], "no grid"),
        ({"trials": [TRIAL]}, "no grid"),
        ({"grid": {"seed": [0]}}, "none of 1 trials"),
        ({"grid": {"seed": [0]}, "trials": []}, "0 of 1 trials"),
        ({"grid": {"seed": [0]}, "trials": [TRIAL, TRIAL]}, "2 of 1 trials"),
        ({"grid": {"seed": [0]}, "trials": [{}]}, "no trial 0 of {'seed': 0}"),
        ({"grid": {"seed": [0]}, "trials": [None]}, "no trial 0 of {'seed': 0}"),
        ({"grid": {"seed": [0]}, "trials": [TRIAL | {"settings": {"seed": 1}}]}, "no trial 0 of {'seed': 0}"),
        ({"grid": {"seed": [0]}, "trials": [TRIAL | {"status": "odd"}]}, "the status 'odd' of trial 0"),
        ({"grid": {"seed": [0]}, "trials": [TRIAL | {"doublings": 1}]}, "the doublings 1 of trial 0"),
        ({"grid": {"seed": [0]}, "trials": [TRIAL | {"doublings": True}]}, "the doublings True of trial 0"),
        ({"grid": {"seed": [0]}, "trials": [TRIAL | {"steps": -1}]}, "the steps -1 of trial 0"),
        ({"grid": {"seed": [0]}, "trials": [TRIAL | {"best_step": "x"}]}, "the best_step 'x' of trial 0"),
    ],
)
def test_a_damaged_table_is_refused(asked: dict[str, Any], tmp_path: Path, stored: Any, told: str) -> None:
    (tmp_path / RESULTS).write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=f"{RESULTS}: expected the results of a sweep; found {told}.*; start anew"):
        sweep(asked, {"seed": [0]}, tmp_path, resume=True)


def test_a_sweep_goes_on_with_halving_as_it_began(asked: dict[str, Any], tmp_path: Path) -> None:
    asked, grid = {**asked, "steps": 4}, {"seed": [0, 1]}
    for halving in (True, False):
        folder = tmp_path / str(halving)
        sweep(asked, grid, folder, halving=halving)
        with pytest.raises(ConfigError, match=f"expected the halving {halving}; found {not halving}; give the same"):
            sweep(asked, grid, folder, halving=not halving, resume=True)
    stored = json.loads((folder / RESULTS).read_text())
    (folder / RESULTS).write_text(json.dumps({key: value for key, value in stored.items() if key != "halving"}))
    found = sweep(asked, grid, folder, resume=True)
    assert [trial.status for trial in found] == ["finished"] * 2


@pytest.mark.parametrize("key", ["compile", "layout", "shard"])
def test_how_a_sweep_is_computed_is_one_for_all(key: str) -> None:
    with pytest.raises(ConfigError, match=f"--grid: expected {key} to be that of all runs"):
        axes([f"{key}=on,off"])


def test_what_cannot_begin_leaves_nothing_behind(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    for setting, told in (({"compile": "on"}, "takes a prefix through a cache"), ({"shard": True}, "found one")):
        with pytest.raises(ConfigError, match=told):
            sweep(given(backbone_folder("falcon"), records, **setting), {"seed": [0, 1]}, tmp_path / "out")
        assert not (tmp_path / "out").exists()
