"""Studies that workers share: the results of a sweep by one, whoever comes, goes or dies."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from prefixkit.cli import run
from prefixkit.errors import ConfigError, DataError
from prefixkit.training import loop, shared_store, study
from prefixkit.training.grid import configs
from prefixkit.training.preparation import prepare
from prefixkit.training.progress import Silence, Step
from prefixkit.training.sweep import BEST, sweep
from prefixkit.training.trials import RESULTS
from tests.training.test_sweep import given

Folder = Callable[..., Path]
GRID: dict[str, list[Any]] = {"optimizer.lr": [0.03, 0.1], "seed": [0, 1]}
DIES = """
import json, os, signal, sys
from prefixkit.training import checkpoint, shared_store, study
real = checkpoint.save
def save(*given):
    real(*given)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save, shared_store.HEARTBEAT = save, 1
study.work(*json.loads(sys.argv[1]))
"""


class Presses(Silence):
    """Presses Ctrl-C at the sixth step."""

    def on_step(self, step: Step) -> None:
        if step.step == 6:
            raise KeyboardInterrupt


@pytest.fixture
def asked(backbone_folder: Folder, records: Path) -> dict[str, Any]:
    return given(backbone_folder("gpt2"), records)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def python(*arguments: str) -> subprocess.Popen[str]:
    """Another process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], stdout=-1, stderr=-1, text=True, env=environment)


def of_one(asked: dict[str, Any], folder: Path) -> list[bytes]:
    """The files of the trials, each run by itself."""
    folder.mkdir()
    found = configs(asked, GRID, folder)
    for config in found:
        loop.train(config)
    return [Path(config.output).read_bytes() for config in found]


def states(store: str) -> list[str]:
    """How the trials of a study stand, as its database has it."""
    with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as connection:
        return sorted(state for (state,) in connection.execute("select state from trials"))


def test_two_workers_share_the_trials(asked: dict[str, Any], store: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(asked))
    out, grid = tmp_path / "out", [f"--grid={key}={','.join(map(str, values))}" for key, values in GRID.items()]
    settings = [f"--set={key}={json.dumps(value)}" for key, value in flat(asked).items()]
    command = ["-m", "prefixkit", "sweep", *grid, *settings, "--study", store, "-o", str(out), "--json"]
    workers = [python(*command), python(*command)]
    told = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    first, second = (json.loads(words) for words, _ in told)
    assert first == second == json.loads((out / RESULTS).read_text())
    assert states(store).count("COMPLETE") == len(states(store)) >= 4
    alone = sweep(asked, GRID, tmp_path / "alone")
    losses = [trial.state.best_loss for trial in alone]
    for trial, other in zip(first["trials"], alone, strict=True):
        row = other.record()
        assert {**row, "validation_loss": trial["validation_loss"]} == trial
    assert [trial["validation_loss"] for trial in first["trials"]] == pytest.approx(losses, rel=1e-4)
    assert (out / BEST).read_bytes() == (out / f"{losses.index(min(losses)):03}.safetensors").read_bytes()


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as `--set` takes them."""
    found = {}
    for key, value in settings.items():
        inner = value.items() if isinstance(value, dict) else ()
        found.update({f"{key}.{name}": item for name, item in inner if item is not None} or {key: value})
    return found


def test_the_trial_of_a_worker_that_died_goes_on_elsewhere(
    asked: dict[str, Any], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    dead = python("-c", DIES, json.dumps([asked, GRID, str(out), store]))
    told = dead.communicate()
    assert dead.returncode == -9, told
    assert states(store) == ["RUNNING"]
    monkeypatch.setattr(shared_store, "HEARTBEAT", 1)
    found = study.work(asked, GRID, out, store)
    assert [trial["status"] for trial in found] == ["finished"] * 4
    assert states(store) == ["COMPLETE"] * 4 + ["FAIL"]
    wanted = of_one(asked, tmp_path / "one")
    assert [(out / trial["output"]).read_bytes() for trial in found] == wanted
    assert sorted(path.name for path in out.iterdir()) == [*(f"00{n}.safetensors" for n in range(4)), BEST, RESULTS]


def test_ctrl_c_leaves_the_trial_to_others(asked: dict[str, Any], store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        study.work(asked, GRID, out, store, listener=Presses())
    assert states(store) == ["FAIL", "WAITING"]
    found = study.work(asked, GRID, out, store)
    assert [(out / trial["output"]).read_bytes() for trial in found] == of_one(asked, tmp_path / "one")


def test_halving_drops_the_worse(asked: dict[str, Any], store: str, tmp_path: Path) -> None:
    grid = {"optimizer.lr": [1e-6, 0.1, 1e-5, 0.03]}
    found = study.work(asked, grid, tmp_path / "out", store, halving=True)
    assert found[1]["status"] == "finished"
    assert "dropped" in [trial["status"] for trial in found]
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["best"] == 1


def test_what_cannot_be_shared_is_refused(
    asked: dict[str, Any], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--study: expected a database that can be opened"):
        study.work(asked, GRID, out, "nonsense")
    with pytest.raises(ConfigError, match="--grid: expected single values of method"):
        study.work(asked, {"method": [{"length": 2}]}, out, store)
    study.work({**asked, "steps": 1}, {"seed": [0]}, out, store)
    with pytest.raises(ConfigError, match="expected the grid of this study; found another"):
        study.work({**asked, "steps": 1}, {"seed": [1]}, out, store)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run(["sweep", "--grid", "seed=0", "--study", store, "-o", str(out)]) == 2
    assert "expected Optuna; found none; pip install 'prefixkit[optuna]'" in capsys.readouterr().err


def test_every_trial_is_checked_before_the_first(asked: dict[str, Any], store: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--length: expected a prefix shorter than the context"):
        study.work(asked, {"method.length": [2, 100000]}, tmp_path / "out", store)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.db"))


@pytest.mark.parametrize("stops", [DataError("records", expected="a file"), KeyboardInterrupt(), RuntimeError()])
def test_a_trial_whose_preparation_stops_is_begun_again(
    asked: dict[str, Any], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: BaseException
) -> None:
    calls = []

    def third(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise stops
        return prepare(*given)

    grid, out = {"seed": [0, 1]}, tmp_path / "out"
    monkeypatch.setattr(study, "prepare", third)
    out.mkdir()
    (out / "000.safetensors.checkpoint").write_text("of something else")
    with pytest.raises(type(stops)):
        study.work(asked, grid, out, store)
    assert states(store) == ["FAIL", "WAITING"]
    assert [trial["status"] for trial in study.work(asked, grid, out, store)] == ["finished"] * 2


class Ends(Silence):
    """Asks to end in the last step of a trial."""

    def on_step(self, step: Step) -> None:
        if step.step == step.total:
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_the_last_step_ends_the_worker_behind_the_trial(
    asked: dict[str, Any], store: str, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        study.work({**asked, "steps": 2}, {"seed": [0, 1]}, tmp_path / "out", store, listener=Ends())
    assert states(store) == ["COMPLETE"]
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["best"] is not None
    assert signal.getsignal(signal.SIGTERM) == before


class Leaves(Silence):
    """Presses Ctrl-C at every step."""

    def on_step(self, step: Step) -> None:
        raise KeyboardInterrupt


def test_a_trial_that_is_left_however_often_is_gone_on_with(asked: dict[str, Any], store: str, tmp_path: Path) -> None:
    """Who stops on purpose is no worker that died: those are given up after a few times."""
    for _ in range(shared_store.RETRIES + 2):
        with pytest.raises(KeyboardInterrupt):
            study.work(asked, {"seed": [0]}, tmp_path / "out", store, listener=Leaves())
    (trial,) = study.work(asked, {"seed": [0]}, tmp_path / "out", store)
    assert trial["status"] == "finished"
    loop.train(next(iter(configs(asked, {"seed": [0]}, tmp_path))))
    assert (tmp_path / "out" / trial["output"]).read_bytes() == (tmp_path / trial["output"]).read_bytes()
