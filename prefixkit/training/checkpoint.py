"""Training state: private to this package, resumable bit for bit, and free to change its layout between versions."""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixkit.errors import ConfigError
from prefixkit.format.atomic import write_bytes
from prefixkit.methods.method import Method
from prefixkit.training.config import OF_THE_MACHINE, recorded
from prefixkit.training.preparation import Prepared

LAYOUT = 1
# What may differ between a run and its continuation: places, whose contents are compared instead, and when to stop.
_PLACES = {*OF_THE_MACHINE, "task", "evaluation.patience"}


@dataclass
class State:
    """Where a run stands.

    Attributes:
        step: steps done.
        last_loss: nats a target token on the last batch.
        best_loss, best_score, best_step, best: the best validation so far and the method's parameters then. Without
            scores `best_score` stays at 0.
        stale: validations since the best one.
        validated: the step that was validated last.
    """

    step: int = 0
    last_loss: float = float("nan")
    best_loss: float = float("inf")
    best_score: float = 0.0
    best_step: int = 0
    best: dict[str, Tensor] | None = None
    stale: int = 0
    validated: int = 0


def path_of(output: str | Path) -> Path:
    """Where the state of the run that writes `output` is kept."""
    return Path(f"{output}.checkpoint")


def save(prepared: Prepared, optimizer: torch.optim.Optimizer, state: State) -> Path:
    """Write the state atomically; returns where."""
    buffer = io.BytesIO()
    stored = {
        "layout": LAYOUT,
        "run": _run(prepared),
        "method": prepared.method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "state": vars(state),
        "order": prepared.batches.order,
    }
    torch.save(stored, buffer)
    path = path_of(prepared.config.output)
    write_bytes(path, buffer.getvalue())
    return path


def restore(prepared: Prepared, optimizer: torch.optim.Optimizer) -> State:
    """Put method, optimizer and random state back where `save` found them, and go on in the same order of the data.

    Raises:
        ConfigError: no checkpoint, an unreadable one, or one of a run with other settings or data.
    """
    path = path_of(prepared.config.output)
    stored = _read(path)
    ours, theirs = _run(prepared), stored.get("run", {})
    # Settings come first: what they make is another as well where one of them is.
    for key in (*ours, *theirs):
        if ours.get(key) != theirs.get(key):
            raise ConfigError(
                path,
                expected=f"{key} = {theirs.get(key)!r} as when the run began",
                found=repr(ours.get(key)),
                next_step="resume with the same settings, or start anew without --resume",
            )
    try:
        prepared.method.load_state_dict(stored["method"])
        optimizer.load_state_dict(stored["optimizer"])
        torch.set_rng_state(stored["random"])
        # Before it was kept, all runs had batches of similar length.
        prepared.batches.order = stored.get("order", "length")
        return State(**stored["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error) from error


def best_method(method: Method, state: State) -> None:
    """Put the parameters of the best validation back into `method`; without one it stays as it is."""
    if state.best is not None:
        method.load_state_dict(state.best)


def _read(path: Path) -> dict[str, Any]:
    try:
        _refuse_flipped(path)
        stored = torch.load(path, weights_only=True)
    except FileNotFoundError as error:
        step = "start without --resume"
        raise ConfigError(path, expected="a checkpoint to resume", found="none", next_step=step) from error
    except Exception as error:  # a damaged file fails in many ways inside torch
        raise _unreadable(path, error) from error
    if not isinstance(stored, dict) or stored.get("layout") != LAYOUT:
        step = "start without --resume"
        raise ConfigError(path, expected=f"layout {LAYOUT}", found="another version's", next_step=step)
    return stored


def _refuse_flipped(path: Path) -> None:
    """Raise BadZipFile for bits that are no longer those that were written: torch does not look at its checksums."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(damaged)


def _unreadable(path: Path, error: Exception) -> ConfigError:
    found = f"a damaged one ({type(error).__name__})"
    return ConfigError(path, expected="a readable checkpoint", found=found, next_step="start without --resume")


def _run(prepared: Prepared) -> dict[str, Any]:
    """What must be equal for a continuation to be the same run, flat: settings, and the contents of every file."""
    run: dict[str, Any] = {}
    settings = {**asdict(prepared.config), "method": recorded(prepared.config)["method"]}
    for key, value in settings.items():
        inner = value.items() if isinstance(value, dict) else ()
        run.update({f"{key}.{name}": item for name, item in inner} if inner else {key: value})
    return {key: value for key, value in run.items() if key not in _PLACES} | {
        "backbone weights": prepared.backbone.identity.weights_hash,
        "tokenizer": prepared.backbone.identity.tokenizer_hash,
        "training data": prepared.data_hash,
        "validation data": prepared.validation_hash,
        "task contract": str(prepared.task),
        "initial prefix": prepared.start_digest,
    }
