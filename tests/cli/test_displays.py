"""What a person sees of a run: loss and speed of this run alone, and names as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prefixkit.cli.sweep_display import SweepDisplay
from prefixkit.cli.training_display import TrainingDisplay
from prefixkit.training.progress import Step

Err = pytest.CaptureFixture[str]
NAME = "a[/b] [red]c :smile:"


def steps(display: TrainingDisplay, numbers: range, loss: float) -> None:
    for number in numbers:
        display.on_step(Step(step=number, total=numbers[-1], loss=loss, tokens=1))


@pytest.mark.parametrize("first", [1, 7])
def test_another_run_has_a_loss_of_its_own(first: int, capsys: Err) -> None:
    with TrainingDisplay() as display:
        steps(display, range(1, 5), 9.0)
        capsys.readouterr()
        steps(display, range(first, first + 3), 2.0)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"step {first}/{first + 2}  loss 2.000"
    assert told[1].startswith(f"step {first + 2}/{first + 2}  loss 2.000")


def test_a_terminal_is_told_of_no_step_before_the_first(monkeypatch: pytest.MonkeyPatch, capsys: Err) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with TrainingDisplay() as display:
        display.bar.refresh()
        assert "starting" in capsys.readouterr().err
        steps(display, range(1, 3), 2.0)
    told = capsys.readouterr().err
    assert "step 2/2" in told
    assert "None" not in told


def test_names_are_told_as_they_are(capsys: Err) -> None:
    state = SimpleNamespace(step=1, best_loss=1.0, last_loss=1.0)
    prepared = SimpleNamespace(total_steps=1)
    trial: Any = SimpleNamespace(
        number=0, point={"method.init": NAME}, state=state, prepared=prepared, status="finished", score=1.0
    )
    TrainingDisplay().on_message(f"stopped at {NAME}")
    SweepDisplay().on_message(f"stopped at {NAME}")
    SweepDisplay().table_of([trial])
    assert capsys.readouterr().err.count(NAME) == 3
