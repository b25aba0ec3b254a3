"""A sweep: every combination of some settings, trained against one backbone, side by side where their rows can be.

Each trial is what a run of its own would be, with its own batches, optimizer state and schedule. With halving (Jamieson
and Talwalkar 2016, arXiv 1502.07943) the worse half is dropped at each of several rungs, and its share of the batch
goes to the better one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from prefixkit.backbones.identity import memory_digest
from prefixkit.errors import ConfigError, PrefixkitError
from prefixkit.format.atomic import write_bytes
from prefixkit.training import checkpoint, loop, side_by_side, sweep_memory, trials
from prefixkit.training.config import TrainConfig
from prefixkit.training.examples import Data, collate_for
from prefixkit.training.grid import configs, points
from prefixkit.training.interruption import AtOnce, between_steps
from prefixkit.training.layout import packs
from prefixkit.training.loading import loaded
from prefixkit.training.memory import tell
from prefixkit.training.out_of_memory import OutOfMemoryError
from prefixkit.training.processes import refuse_several
from prefixkit.training.progress import Listener, Silence
from prefixkit.training.trials import Hearing, Trial, best_of
from prefixkit.training.validation import validate
from prefixkit.training.warm_up import warm_up

BEST = "best.safetensors"


class SweepListener(Listener, Protocol):
    """Whoever wants to know how the trials stand."""

    def on_trials(self, trials: Sequence[Trial], tokens: int) -> None:
        """After every step of all of them, which read so many real tokens."""


class Quiet(Silence):
    """A listener that ignores everything."""

    def on_trials(self, trials: Sequence[Trial], tokens: int) -> None:
        """Ignore it."""


def sweep(
    settings: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    output: str | Path,
    *,
    halving: bool = False,
    resume: bool = False,
    listener: SweepListener | None = None,
) -> list[Trial]:
    """Train every combination of `grid` over `settings`; the folder `output` gets a file each, and the best once more.

    Ctrl-C keeps what was done, for `resume`; so does running out of memory.

    Args:
        settings: of a run, nested, without an output.
        grid: the values of each key, such as `optimizer.lr`.

    Returns:
        The trials as they ended.

    Raises:
        InputError: whatever is wrong with the settings, the data or the folder.
        PrefixkitError: the frozen backbone changed.
    """
    refuse_several("a sweep", "start it on each machine with --study instead")
    folder, listener = Path(output), listener or Quiet()
    made = configs(settings, grid, folder)
    earlier = trials.read(folder, grid, halving) if resume else None
    with kept_folder(folder, resume):
        found = _begin(made, grid, listener)
        if halving:
            _refuse_unequal(found)
        needs = tell(lambda: sweep_memory.estimate(found), listener)
        with sweep_memory.within(needs):
            _warm_up(found, listener)
    if earlier is not None:
        for trial, known in zip(found, earlier, strict=True):
            trials.resume(trial, known)

    def keep() -> None:
        trials.write(folder, grid, halving, [trial.record() for trial in found])

    model = found[0].prepared.backbone.model
    frozen = memory_digest(model)
    try:
        with between_steps(listener.on_message) as check, sweep_memory.within(needs):
            _run(found, halving, listener, check, keep)
    except AtOnce:
        raise
    except (KeyboardInterrupt, OutOfMemoryError):
        for trial in _running(found):
            checkpoint.save(trial.prepared, trial.optimizer, trial.state)
        keep()
        listener.on_message(f"stopped; --resume goes on from {folder}")
        raise
    if memory_digest(model) != frozen:
        raise PrefixkitError(model.config.model_type, expected="frozen weights", found="weights that changed")
    _keep_best(folder, found)
    return found


@contextmanager
def kept_folder(path: Path, resume: bool) -> Iterator[None]:
    """The folder at `path` from here on, unless what is done in the `with` block fails. Raises ConfigError."""
    if (path / trials.RESULTS).exists() and not resume:
        step = "use --resume to go on with it, or another folder"
        raise ConfigError(path, expected="a new folder", found="an earlier sweep", next_step=step)
    try:
        new = not path.exists()
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(path, expected="a folder that can be made", found=error.strerror or str(error)) from error
    try:
        yield
    except BaseException:
        if new and not any(path.iterdir()):
            path.rmdir()
        raise


def _begin(made: Sequence[TrainConfig], grid: Mapping[str, Sequence[Any]], listener: Listener) -> list[Trial]:
    first, data = made[0], Data()
    backbone = loaded(first)
    found = []
    for number, (point, config) in enumerate(zip(points(grid), made, strict=True)):
        found.append(trials.begin(number, point, config, backbone, data))
    for told in sorted({trial.prepared.unpacked or "" for trial in found} - {""}):
        listener.on_message(told)
    alone = [trial.number for trial in found if not trial.shares]
    if alone:
        told = "all trials" if len(alone) == len(found) else f"trials {', '.join(map(str, alone))}"
        wanted = "which takes keys and values for words, labels or tags"
        listener.on_message(f"{told}: computed one after the other, not side by side, {wanted}")
    return found


def _warm_up(found: Sequence[Trial], listener: Listener) -> None:
    """Settle how the trials are computed, by one whose batches are packed, if there is any."""
    packed = [trial.prepared for trial in found if packs(trial.prepared.batches.collate)]
    leading = found[0].prepared if not packed else packed[0]
    shares = any(trial.shares for trial in found if trial.prepared is leading)
    warm_up(leading, leading.total_steps, listener, beside=shares)
    if not packs(leading.batches.collate):
        for prepared in packed:
            prepared.batches.collate = collate_for(prepared.task, prepared.backbone)


def _refuse_unequal(found: Sequence[Trial]) -> None:
    lengths = {trial.prepared.total_steps for trial in found}
    if len(lengths) > 1:
        expected, step = "trials of equally many steps to halve", "set --steps, or leave --halving out"
        raise ConfigError("--halving", expected=expected, found=f"{sorted(lengths)}", next_step=step)


def _running(found: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in found if trial.status == "running"]


def _run(
    found: Sequence[Trial], halving: bool, listener: SweepListener, check: Callable[[], None], keep: Callable[[], None]
) -> None:
    """Step all trials together until each has come to its end; `keep` is called whenever one has."""
    keep()
    while True:
        if halving:
            _halve(found, keep)
        for trial in _running(found):
            if loop.is_over(trial.prepared, trial.optimizer, trial.state, Hearing(trial, listener)):
                trial.finish("finished")
                keep()
        if not (live := _running(found)):
            return
        check()
        tokens = _step(live)
        for trial in live:
            _refuse_divergence(trial, listener)
        listener.on_trials(found, tokens)


def _step(live: Sequence[Trial]) -> int:
    """One step of every trial; gives the number of real tokens that were read."""
    together = [trial for trial in live if trial.shares]
    tokens = sum(step.tokens for step in side_by_side.step(together)) if together else 0
    for trial in live:
        if not trial.shares:
            tokens += loop.advance(trial.prepared, trial.optimizer, trial.state).tokens
    return tokens


def _refuse_divergence(trial: Trial, listener: Listener) -> None:
    try:
        loop.refuse_divergence(trial.state)
    except loop.DivergenceError as error:
        trial.status = "diverged"
        checkpoint.path_of(trial.prepared.config.output).unlink(missing_ok=True)
        listener.on_message(f"trial {trial.number} diverged: {error}")


def rungs(count: int, steps: int) -> list[int]:
    """The steps at which `count` trials of `steps` are halved, until one is left: evenly through the run."""
    times = max(0, (count - 1).bit_length())
    return [steps * rung // (times + 1) for rung in range(1, times + 1)]


def _halve(found: Sequence[Trial], keep: Callable[[], None]) -> None:
    """At a rung, drop the worse half of the trials that are left, and give its share to the others."""
    live = _running(found)
    if len(live) < 2:
        return
    reached = rungs(len(found), live[0].prepared.total_steps)
    passed = max(trial.doublings for trial in live)
    if passed >= len(reached) or live[0].state.step < reached[passed]:
        return
    for trial in live:
        if trial.state.validated != trial.state.step:
            validate(trial.prepared, trial.state, Silence())
    ranked = sorted(live, key=lambda trial: trial.score)
    kept = -(-len(ranked) // 2)
    for trial in ranked[kept:]:
        trial.finish("dropped")
    for trial in ranked[:kept]:
        trial.double()
        checkpoint.save(trial.prepared, trial.optimizer, trial.state)
    keep()


def _keep_best(folder: Path, found: Sequence[Trial]) -> None:
    best = best_of(found)
    if best is not None:
        write_bytes(folder / BEST, Path(best.prepared.config.output).read_bytes())
