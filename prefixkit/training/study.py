"""A sweep that machines share: each takes trials from one study until all are done. Optuna keeps the study.

Akiba et al. 2019, arXiv 1907.10902. Optuna says who takes which combination, and whose trial is another's when a worker
has gone silent: its continuation is the run from its last checkpoint. With halving, Optuna's asynchronous successive
halving (Li et al. 2018, arXiv 1810.05934) drops trials.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixkit.errors import ConfigError, InputError
from prefixkit.format.atomic import write_bytes
from prefixkit.training import checkpoint, loop
from prefixkit.training.config import recorded
from prefixkit.training.examples import Data
from prefixkit.training.grid import configs, points
from prefixkit.training.interruption import between_steps
from prefixkit.training.loading import loaded
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.processes import refuse_several
from prefixkit.training.progress import Listener, Silence, Step, Validation
from prefixkit.training.shared_store import engine, opened
from prefixkit.training.sweep import BEST, kept_folder
from prefixkit.training.trials import best_row, row, write

_POLL = 2.0
"""Seconds between two looks at what others do."""
_STATUS = {"COMPLETE": "finished", "PRUNED": "dropped", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


def work(
    settings: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    output: str | Path,
    store: str,
    *,
    halving: bool = False,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Take trials of the study in `store` until all are done, by whomever; `output`, on a disk that all workers share,
    gets a file each, the best once more, and the table of results.

    Args:
        settings, grid: as of `prefixkit.training.sweep.sweep`.
        store: the URL of a database, such as `sqlite:///study.db`.

    Returns:
        The results, as they are in the table.

    Raises:
        InputError: no Optuna, or whatever is wrong with the database, the settings or the data.
    """
    refuse_several("a study", "start it on each machine without torchrun")
    optuna = engine()
    with warnings.catch_warnings():
        # Signs of life have been "experimental" in Optuna since 2021.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        worker = _Worker(optuna, settings, grid, Path(output), store, halving, listener or Silence())
        try:
            with between_steps(worker.listener.on_message) as check:
                while (free := worker.free()) is not None:
                    check()
                    if free:
                        worker.take()
                    else:
                        worker.look()
            return worker.write()
        finally:
            worker.shared.close()


class _Worker:
    """One of those who work on a study."""

    def __init__(
        self,
        optuna: Any,
        settings: Mapping[str, Any],
        grid: Mapping[str, Sequence[Any]],
        folder: Path,
        store: str,
        halving: bool,
        listener: Listener,
    ) -> None:
        self.optuna, self.grid, self.folder, self.halving, self.listener = optuna, grid, folder, halving, listener
        self.points, self.configs = points(grid), configs(settings, grid, folder)
        first = self.configs[0]
        self.scored, self.data = first.evaluation.metric == "score", Data()
        _refuse_compound(grid)
        self.backbone = loaded(first)
        described = {"grid": dict(grid), "halving": halving, "settings": recorded(first)}
        with kept_folder(folder, resume=True):
            for number in range(len(self.configs)):
                self._prepared(number)
            self.shared = opened(optuna, store, folder.resolve().name, described, highest=self.scored)
        self.study = self.shared.study

    def free(self) -> bool | None:
        """Whether there is a trial to take; None where all are done."""
        states = self.optuna.trial.TrialState
        trials = self.study.get_trials(deepcopy=False)
        live = [trial for trial in trials if trial.state == states.RUNNING]
        numbers = [self._number(trial) for trial in live]
        # A trial that has only just begun has no settings yet.
        begun = len({self._number(trial) for trial in trials} - {None}) + numbers.count(None)
        if begun < len(self.points) or any(trial.state == states.WAITING for trial in trials):
            return True
        return False if live else None

    def _number(self, trial: Any) -> int | None:
        return self.points.index(trial.params) if trial.params in self.points else None

    def take(self) -> None:
        """Do one trial."""
        try:
            self.study.optimize(self._trial, n_trials=1)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            self.listener.on_message("this worker was silent for long: another has taken its trial over")
        self.write()

    def look(self) -> None:
        """Wait a little, and see whether somebody has gone silent."""
        time.sleep(_POLL)
        self.optuna.storages.fail_stale_trials(self.study)

    def _trial(self, trial: Any) -> float:
        try:
            return self._trained(trial)
        except (self.optuna.TrialPruned, self.optuna.exceptions.UpdateFinishedTrialError):
            raise
        except (KeyboardInterrupt, InputError):
            # A later start goes on with it, however often somebody stops: that is no worker that died.
            self.shared.leave(trial.number)
            raise
        except BaseException:
            self.shared.again(trial.number)
            raise

    def _trained(self, trial: Any) -> float:
        point = {key: trial.suggest_categorical(key, list(values)) for key, values in self.grid.items()}
        number, told = self.points.index(point), ", ".join(f"{key} {value}" for key, value in point.items())
        self.listener.on_message(f"trial {number}: {told}")
        known, kept = self.study.trials[trial.number], checkpoint.path_of(self.configs[number].output)
        if not (again := "failed_trial" in known.system_attrs or "left" in known.user_attrs):
            kept.unlink(missing_ok=True)
        prepared, resume = self._prepared(number), again and kept.exists()
        reporting = _Reporting(trial, prepared, self.halving, self.optuna, self.listener)
        try:
            metrics = dict(loop.complete(prepared, resume=resume, listener=reporting).manifest.provenance.metrics)
        except self.optuna.TrialPruned:
            kept.unlink(missing_ok=True)
            raise
        except loop.DivergenceError as error:
            self.listener.on_message(str(error))
            kept.unlink(missing_ok=True)
            return math.nan
        trial.set_user_attr("metrics", metrics)
        return metrics.get("validation_score" if self.scored else "validation_loss", math.nan)

    def _prepared(self, number: int) -> Prepared:
        return prepare(self.configs[number], self.backbone, self.data)

    def write(self) -> list[dict[str, Any]]:
        """Write how the trials stand, and the best of them; all workers come to the same."""
        complete = self.optuna.trial.TrialState.COMPLETE
        tried = sorted(self.study.get_trials(), key=lambda trial: (trial.state == complete, trial.number))
        last = {number: trial for trial in tried if (number := self._number(trial)) is not None}
        rows = [self._record(number, last[number]) for number in sorted(last)]
        best = best_row(rows)
        if best is not None:
            write_bytes(self.folder / BEST, self._written(best["output"]))
        write(self.folder, self.grid, self.halving, rows)
        return rows

    def _written(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            step = "use another --output, or one on a disk that all workers share"
            raise ConfigError(
                self.folder, expected="the folder of all workers", found=f"no {name}", next_step=step
            ) from error

    def _record(self, number: int, trial: Any) -> dict[str, Any]:
        metrics, status = trial.user_attrs.get("metrics", {}), _STATUS[trial.state.name]
        return row(
            number,
            self.points[number],
            status,
            steps=trial.user_attrs.get("steps", 0),
            best_step=int(metrics.get("steps", 0)),
            loss=metrics.get("validation_loss"),
            score=metrics.get("validation_score", 0.0) if self.scored else None,
            written=status == "finished",
        )


class _Reporting(Silence):
    """Tells Optuna the validations of a trial, which may drop it for them."""

    def __init__(self, trial: Any, prepared: Prepared, halving: bool, optuna: Any, listener: Listener) -> None:
        self.trial, self.prepared, self.halving, self.optuna, self.listener = trial, prepared, halving, optuna, listener

    def on_step(self, step: Step) -> None:
        """Pass it on."""
        self.listener.on_step(step)

    def on_message(self, message: str) -> None:
        """Pass it on."""
        self.listener.on_message(message)

    def on_validation(self, validation: Validation) -> None:
        """Pass it on, and stop where it is among the worse at its rung."""
        self.listener.on_validation(validation)
        every = loop.validation_interval(self.prepared)
        value = validation.loss if validation.score is None else validation.score
        self.trial.set_user_attr("steps", validation.step)
        self.trial.report(value, -(-validation.step // every))
        if self.halving and validation.step < self.prepared.total_steps and self.trial.should_prune():
            raise self.optuna.TrialPruned


def _refuse_compound(grid: Mapping[str, Sequence[Any]]) -> None:
    for key, values in grid.items():
        for value in values:
            if not isinstance(value, (str, int, float, bool)):
                step = "sweep it without --study"
                raise ConfigError("--grid", expected=f"single values of {key}", found=str(value), next_step=step)
