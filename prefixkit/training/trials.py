"""The runs of a sweep, and the file that says how each of them stands."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.backbones.backbone import Backbone
from prefixkit.data.batches import TrainingBatches
from prefixkit.errors import ConfigError
from prefixkit.format.atomic import write_bytes
from prefixkit.prefix import load, save
from prefixkit.training import checkpoint, loop
from prefixkit.training.checkpoint import State
from prefixkit.training.config import TrainConfig
from prefixkit.training.examples import Data
from prefixkit.training.grid import Point, points
from prefixkit.training.preparation import prepare
from prefixkit.training.progress import Listener, Silence, Validation
from prefixkit.training.side_by_side import Run, can_share

RESULTS = "sweep.json"
_STATUSES = ("running", "finished", "diverged", "dropped")


@dataclass
class Trial(Run):
    """One run of a sweep.

    Attributes:
        number: its place in the grid.
        point: the settings that are its own.
        shares: whether its rows are computed beside those of other trials.
        status: `running`, `finished`, `diverged`, or `dropped` by halving.
        doublings: how often it was given the share of a dropped one.
    """

    number: int
    point: Point
    shares: bool
    status: str = "running"
    doublings: int = 0

    @property
    def score(self) -> tuple[float, float]:
        """The lower the better: of the best validation, its accuracy or F1 where that decides, then its loss."""
        return (math.inf, math.inf) if self.status == "diverged" else (-self.state.best_score, self.state.best_loss)

    def double(self) -> None:
        """Give each of its steps twice the examples from here on."""
        config, batches = self.prepared.config, self.prepared.batches
        self.prepared.batches = TrainingBatches(
            batches.examples,
            batch_size=2 * batches.batch_size,
            seed=config.seed,
            collate=batches.collate,
            order=batches.order,
        )
        self.doublings += 1

    def record(self) -> dict[str, Any]:
        """What the file of results says of it."""
        state, known = self.state, math.isfinite(self.state.best_loss)
        scored = self.prepared.config.evaluation.metric == "score"
        return row(
            self.number,
            self.point,
            self.status,
            steps=state.step,
            best_step=state.best_step,
            loss=state.best_loss if known else None,
            score=state.best_score if scored else None,
            doublings=self.doublings,
            written=self.status in ("finished", "dropped"),
        )

    def finish(self, status: str) -> None:
        """Write its prefix, and forget the state that it would have gone on from."""
        self.status = status
        save(loop.result(self.prepared, self.state), self.prepared.config.output)
        checkpoint.path_of(self.prepared.config.output).unlink(missing_ok=True)


class Hearing(Silence):
    """Passes on what one trial says of itself, with its number."""

    def __init__(self, trial: Trial, listener: Listener) -> None:
        self.trial, self.listener = trial, listener

    def on_validation(self, validation: Validation) -> None:
        """Nothing: the table shows it."""

    def on_message(self, message: str) -> None:
        """A sentence for the user."""
        self.listener.on_message(f"trial {self.trial.number}: {message}")


def begin(number: int, point: Point, config: TrainConfig, backbone: Backbone, data: Data) -> Trial:
    """A trial before its first step. Raises InputError for whatever is wrong with its settings."""
    prepared = prepare(config, backbone, data)
    return Trial(prepared, loop.make_optimizer(prepared), State(), number, point, can_share(prepared))


def resume(trial: Trial, known: Mapping[str, Any]) -> None:
    """Put `trial` back where the file of results, its own file and its checkpoint left it."""
    config = trial.prepared.config
    trial.status = known["status"]
    for _ in range(known["doublings"]):
        trial.double()
    if trial.status == "running" and checkpoint.path_of(config.output).exists():
        trial.state = checkpoint.restore(trial.prepared, trial.optimizer)
        return
    if trial.status in ("finished", "dropped"):
        metrics = load(config.output).manifest.provenance.metrics
        loss, score = metrics.get("validation_loss", math.inf), metrics.get("validation_score", 0.0)
        step = int(metrics.get("steps", known["best_step"]))
        trial.state = State(step=known["steps"], best_loss=loss, best_score=score, best_step=step)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial of the best validation among those that came to their end; None where there is none."""
    best = best_row([trial.record() for trial in trials])
    return None if best is None else next(trial for trial in trials if trial.number == best["trial"])


def row(
    number: int,
    point: Point,
    status: str,
    *,
    steps: int,
    best_step: int,
    loss: float | None,
    score: float | None,
    doublings: int = 0,
    written: bool,
) -> dict[str, Any]:
    """What the file of results says of a trial; `score` is there where it decides, the output where it is `written`."""
    return {
        "trial": number,
        "settings": dict(point),
        "status": status,
        "steps": steps,
        "best_step": best_step,
        "validation_loss": loss,
        **({} if score is None else {"validation_score": score}),
        "doublings": doublings,
        "output": f"{number:03}.safetensors" if written else None,
    }


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the best validation among those that came to their end; None where there is none."""

    def rank(one: Mapping[str, Any]) -> tuple[float, float]:
        loss = one["validation_loss"]
        return -one.get("validation_score", 0.0), math.inf if loss is None else loss

    return min((one for one in rows if one["status"] == "finished"), key=rank, default=None)


def write(folder: Path, grid: Mapping[str, Sequence[Any]], halving: bool, rows: Sequence[dict[str, Any]]) -> None:
    """Write the file of results; the best of the trials that ended is named."""
    best = best_row(rows)
    stored = {
        "version": 1,
        "grid": {key: list(values) for key, values in grid.items()},
        "halving": halving,
        "best": None if best is None else best["trial"],
        "trials": rows,
    }
    write_bytes(folder / RESULTS, (json.dumps(stored, indent=1) + "\n").encode())


def read(folder: Path, grid: Mapping[str, Sequence[Any]], halving: bool) -> list[dict[str, Any]]:
    """How the trials of an earlier sweep stand.

    Raises:
        ConfigError: no file of results, an unreadable or damaged one, or one of another grid, with halving or without.
    """
    path = folder / RESULTS
    stored = _stored(path)
    # Files without `halving` are older, and of either kind.
    for key, value in {"grid": {key: list(values) for key, values in grid.items()}, "halving": halving}.items():
        if (known := stored.get(key, value)) != value:
            step = f"give the same {key}, or another --output"
            raise ConfigError(path, expected=f"the {key} {known}", found=str(value), next_step=step)
    return _judged(path, points(grid), stored.get("trials"))


def _stored(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        step = "start without --resume"
        raise ConfigError(path, expected="a sweep to resume", found="none", next_step=step) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(stored, dict) or "grid" not in stored:
        raise _damaged(path, "no grid")
    return stored


def _judged(path: Path, known: Sequence[Point], trials: Any) -> list[dict[str, Any]]:
    """What a file says of each trial. Raises ConfigError unless all of them are there, each in a state that can be."""
    if not isinstance(trials, list) or len(trials) != len(known):
        raise _damaged(path, f"{len(trials) if isinstance(trials, list) else 'none'} of {len(known)} trials")
    # Halved until one is left.
    highest = {"steps": math.inf, "best_step": math.inf, "doublings": (len(known) - 1).bit_length()}
    for number, (point, trial) in enumerate(zip(known, trials, strict=True)):
        if not isinstance(trial, dict) or trial.get("settings") != point:
            raise _damaged(path, f"no trial {number} of {dict(point)}")
        if (status := trial.get("status")) not in _STATUSES:
            raise _damaged(path, f"the status {status!r} of trial {number}")
        for key, most in highest.items():
            if type(value := trial.get(key)) is not int or not 0 <= value <= most:
                raise _damaged(path, f"the {key} {value!r} of trial {number}")
    return trials


def _damaged(path: Path, found: str) -> ConfigError:
    step = "start anew with another --output"
    return ConfigError(path, expected="the results of a sweep", found=found, next_step=step)
