"""Where Optuna keeps a study that machines share: a database, with signs of life of everybody who works on a trial."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefixkit.errors import ConfigError

HEARTBEAT = 30
"""Seconds between two signs of life; a trial whose worker misses three is another worker's."""
RETRIES = 3
"""How often a trial that somebody left is begun again."""
_OTHERS = 2.0
"""Seconds that another worker takes to make the tables."""


@dataclass(frozen=True)
class Shared:
    """A study in its database.

    Attributes:
        study, storage, retry: Optuna's.
    """

    study: Any
    storage: Any
    retry: Any

    def again(self, number: int) -> None:
        """Leave a trial to whoever asks next, with what it knows of itself."""
        self.retry(self.study, self.study.trials[number])

    def leave(self, number: int) -> None:
        """The same for one that somebody stopped on purpose, which may happen any number of times."""
        from optuna.trial import TrialState, create_trial

        # Not `enqueue_trial`: GridSampler asks for the place in the grid, which only what it began itself knows.
        trial = self.study.trials[number]
        given = {"params": trial.params, "distributions": trial.distributions, "system_attrs": trial.system_attrs}
        told = {**trial.user_attrs, "left": True}
        self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=told, **given))

    def close(self) -> None:
        """Close what is open to the database."""
        self.storage.remove_session()
        self.storage.engine.dispose()


def engine() -> Any:
    """Optuna. Raises ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        step = "pip install 'prefixkit[optuna]'"
        raise ConfigError("--study", expected="Optuna", found="none", next_step=step) from error
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    return optuna


def opened(optuna: Any, store: str, name: str, described: Mapping[str, Any], *, highest: bool) -> Shared:
    """The study `name` in the database `store`, which is made where there is none.

    Args:
        described: what all who work on it must agree on; `grid` is the grid.
        highest: whether the highest value is the best.

    Raises:
        ConfigError: no database, or a study of something else.
    """
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
    grid = {key: list(values) for key, values in described["grid"].items()}
    try:
        storage = _storage(optuna, store, retry)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=optuna.samplers.GridSampler(grid),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
            direction="maximize" if highest else "minimize",
            load_if_exists=True,
        )
    except Exception as error:  # every database raises its own types
        expected = "a database that can be opened, such as sqlite:///study.db"
        found = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError("--study", expected=expected, found=found) from error
    _agree(study, json.loads(json.dumps(described)), store)
    return Shared(study, storage, retry)


def _storage(optuna: Any, store: str, retry: Any) -> Any:
    signs = {"heartbeat_interval": HEARTBEAT, "grace_period": 3 * HEARTBEAT, "heartbeat_stale_trial_callback": retry}
    from sqlalchemy.exc import DBAPIError

    try:
        return optuna.storages.RDBStorage(store, **signs)
    except DBAPIError:
        # Of two workers that make the tables at the same moment one finds some of them there already.
        time.sleep(_OTHERS)
        return optuna.storages.RDBStorage(store, **signs)


def _agree(study: Any, wanted: Mapping[str, Any], store: str) -> None:
    known = study.user_attrs.get("sweep", wanted)
    for key, value in wanted.items():
        if known.get(key) != value:
            step = "give the same command, or another --output"
            raise ConfigError(store, expected=f"the {key} of this study", found="another", next_step=step)
    study.set_user_attr("sweep", wanted)
